// What is learned from: pictures, a pair of them, words, or rows; and what the page shows of each.
(function(app) {
    "use strict";

    const ways = (app.ways = {});
    const HIDDEN = "lora_trainer_other_task";
    const bases = {}; // the base model of a language model's training and of the others
    const kinds = {}; // the kind that was chosen last, by task
    let isText = false;

    const radio = () => document.querySelector("input[name=lora_trainer_kind]:checked");
    const wayOf = (kind) => kind.closest("[data-way]").dataset.way;
    const all = (selector) => document.querySelectorAll("#lora_trainer_tab_train " + selector);

    /** One of the setting task. */
    ways.task = () => (radio() || {dataset: {task: "image"}}).dataset.task;

    ways.isChange = (task) => ["words", "pair", "slider"].includes(task);
    /** Whether what is for one kind of training is for another as well: a change is taught to an image model. */
    const serves = (one, task) => [undefined, task].includes(one) || (one === "image" && ways.isChange(task));

    /** Whether a setting means something in what is trained now. */
    ways.fits = function(name) {
        const {task, idle, kinds: some} = app.form.control(name).closest("[data-field]").dataset;
        const now = ways.task();
        if ((idle || "").split(" ").includes(now) || (some && !some.split(" ").includes(app.form.kind()))) return false;
        // The trigger word of a change is nobody's but a person's.
        return serves(task, now) && !(name === "trigger_word" && ways.isChange(now) && !app.form.given.trigger_word);
    };

    ways.begin = function() {
        all("input[name=lora_trainer_way]").forEach((node) => node.addEventListener("change", () => ways.open(node.value)));
    };

    /** Go this way, with the kind that was chosen last with it, or its first one. */
    ways.open = function(way) {
        const task = {pictures: "image", pair: "pair", words: "words"}[way];
        if (ways.task() === task) return;
        const some = [...all("input[name=lora_trainer_kind]")].filter((one) => one.dataset.task === task);
        (some.find((one) => one.value === kinds[task]) || some[0]).checked = true;
        app.form.faithful = false;
        app.presets.choose(null);
        app.form.changed();
    };

    /** The kind of the second step that settings are of; null where the one that is chosen serves. */
    ways.kindOf = function({task, positive_prompt: more, negative_prompt: less, target_prompt: target, max_timestep: most}) {
        if (task === "words") return more || less ? "words_slider" : target ? "turn" : "erase";
        if (task === "pair") return most < 999 ? "look" : "expression";
        if (task === "slider") return "opposites";
        if (task === "text") return "text";
        return ways.task() === "image" ? null : "character";
    };

    /** Show what belongs to the chosen kind; a language model and image models keep their own base model. */
    ways.follow = function() {
        const kind = radio();
        if (!kind) return;
        const [way, task] = [wayOf(kind), ways.task()];
        kinds[task] = kind.value;
        document.querySelector(`input[name=lora_trainer_way][value=${way}]`).checked = true;
        all("[data-way]").forEach((node) => node.classList.toggle("lora_trainer_other_way", node.dataset.way !== way));
        all("[data-task]:not([data-field]):not(input)").forEach((node) => node.classList.toggle(HIDDEN, !serves(node.dataset.task, task)));
        all("[data-field]").forEach((node) => {
            if (app.form.control(node.dataset.field)) node.classList.toggle(HIDDEN, !ways.fits(node.dataset.field));
        });
        if (isText === (task === "text")) return;
        bases[isText] = app.form.given.base_model;
        isText = !isText;
        if (bases[isText] === undefined) delete app.form.given.base_model;
        else app.form.given.base_model = bases[isText];
        document.querySelector(`#lora_trainer_form section[data-task=${isText ? "text" : "image"}]`).append(app.get("problem_train_data_dir"));
        app.fillModels().catch((error) => app.complain(error, app.get("problem_base_model")));
    };
})(loraTrainer);
