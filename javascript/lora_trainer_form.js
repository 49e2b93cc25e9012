// The form: what a person set (given), what fits the kind, the pictures and the model (suggested), and what is wrong.
(function(app) {
    "use strict";

    const form = (app.form = {
        given: {}, filled: {}, untouched: new Set(), suggested: {}, own: {}, defaults: {},
        continues: null, left: null, faithful: false, started: null, told: null,
    });
    // filled, untouched: what an earlier run or a file set, of settings that go with others; and those of them that
    // nobody touched since
    // own: what the host's settings page gives every new training
    // started: the name under which this form was started last, so that it is no news that it is taken
    // told: what a run said of a setting at its end, until something is changed
    // continues: {id, name, pictures} of the run whose LoRA is the beginning; left: the same, once others were chosen
    // faithful: the values are an earlier run's; nothing is suggested instead of its defaults

    form.controls = () => document.querySelectorAll("#lora_trainer [data-setting]");
    form.control = (name) => app.get("field_" + name);
    /** What a setting is called on the page. */
    form.label = (name) => form.control(name).closest("[data-field]").querySelector("label > span").textContent.trim();
    form.kind = () => (document.querySelector("input[name=lora_trainer_kind]:checked") || {}).value || "character";

    form.task = () => app.ways.task();
    /** What is learned from: pictures, rows, or words. Nothing as long as it is not there. */
    form.data = function() {
        switch (form.task()) {
        case "text": return app.texts.chosen;
        case "words": return PROMPTS.map((name) => form.value(name)).join("");
        case "image": return app.pictures.chosen;
        default: return app.pair.data(form.task());
        }
    };
    const PROMPTS = ["original_prompt", "target_prompt", "positive_prompt", "negative_prompt"];

    /** A control's text as the value that the API takes; null for an empty one. */
    function read(control) {
        const text = control.value.trim();
        switch (control.dataset.type) {
        case "boolean": return control.checked;
        case "switch": return scalar(text);
        case "lines": return text ? text.split("\n").map((line) => line.trim()).filter(Boolean) : [];
        case "numbers": return text ? text.split(/[\s,]+/).map(number) : null;
        case "number": return text === "" ? null : number(text);
        case "mapping": return mapping(text);
        default: return text;
        }
    }

    /** A number where it is one; else the text, about which the server says what is wrong. */
    const number = (text) => (text !== "" && isFinite(Number(text)) ? Number(text) : text);

    function mapping(text) {
        const pairs = text.split("\n").map((line) => line.split(":")).filter((parts) => parts[0].trim());
        return Object.fromEntries(pairs.map(([name, ...rest]) => [name.trim(), scalar(rest.join(":").trim())]));
    }

    /** A number, true, false or a list where it is one: "false" as a text would mean true. */
    function scalar(text) {
        try {
            return JSON.parse(text);
        } catch (error) {
            return number(text);
        }
    }

    function write(control, value) {
        if (control.dataset.type === "boolean") control.checked = Boolean(value);
        else if (value === null || value === undefined) control.value = "";
        else if (Array.isArray(value)) control.value = value.join(control.dataset.type === "lines" ? "\n" : ", ");
        else if (typeof value === "object") control.value = Object.entries(value).map(([name, one]) => `${name}: ${typeof one === "string" ? one : JSON.stringify(one)}`).join("\n");
        else control.value = short(value);
        if (control.tagName !== "SELECT" || control.selectedIndex >= 0) return;
        // A base model may be named by its path, as on the command line; a file may give a share instead of yes or no.
        const given = value || value === 0;
        if (given && (control === form.control("base_model") || control.dataset.type === "switch")) control.append(app.el("option", {value: short(value)}, short(value)));
        control.selectedIndex = given ? control.options.length - 1 : 0;
    }

    const short = (value) =>
        typeof value === "number" && value !== 0 && Math.abs(value) < 0.01 ? value.toExponential() : String(value);

    // An empty field and a setting that has no value are the same.
    const plain = (value) => JSON.stringify(value === "" || value === undefined ? null : value);
    const same = (one, other) => plain(one) === plain(other);

    /** The values in the page before anybody touched them are the defaults of the schema. */
    form.begin = function() {
        form.controls().forEach((control) => (form.defaults[control.dataset.setting] = read(control)));
        document.getElementById("lora_trainer").addEventListener("input", (event) => {
            const name = event.target.dataset.setting;
            if (name) form.set(name, read(event.target));
        });
    };

    /** A person chose a value; undefined goes back to the suggestion. */
    form.set = function(name, value) {
        form.untouched.delete(name);
        if (value === undefined) delete form.given[name];
        else form.given[name] = value;
        form.problem(name, null);
        form.changed(name, value === undefined ? undefined : name);
    };

    /** After anything changed: remember it, follow it, ask anew what the run would take. */
    form.changed = function(name, typing) {
        form.told = null;
        if (name === "output_name" || name === undefined) {
            form.suggested.trigger_word = (form.task() === "image" && rare(String(form.given.output_name || ""))) || undefined;
        }
        if (name === "trigger_word" || name === undefined) {
            // And the name the trigger word: it is what will be typed in prompts.
            form.suggested.output_name = String(form.given.trigger_word || "").trim().replace(/[^\p{L}\p{N}]+/gu, "_") || undefined;
        }
        form.display(typing);
        form.store();
        app.estimate.soon();
    };

    /** A word that the model knows nothing of yet, from a name without its version: "my_face_v2" -> "zwxmfc". */
    function rare(name) {
        const stem = name.toLowerCase().replace(/[_\s-]?v?\d*$/, "");
        const letters = [...stem].filter((letter) => /[\p{L}\p{N}]/u.test(letter));
        const consonants = letters.filter((letter) => !/[aeiouy]/.test(letter))
            .map((letter) => (/[a-z]/.test(letter) ? letter : "bcdfghjklmnpqrstvwxz"[letter.codePointAt(0) % 20]));
        return letters.length ? "zwx" + consonants.slice(0, 4).join("") : "";
    }

    form.store = () =>
        app.remember("form", {
            given: form.given, filled: form.filled, untouched: [...form.untouched], kind: form.kind(), folder: app.pictures.chosen,
            texts: app.texts.chosen, pair: app.pair.remembered(), continues: form.continues, faithful: form.faithful, started: form.started, preset: app.presets.chosen,
        });

    form.restore = function(remembered) {
        form.given = remembered.given || {};
        form.filled = remembered.filled || {};
        form.untouched = new Set(remembered.untouched || []);
        form.continues = remembered.continues || null;
        form.faithful = Boolean(remembered.faithful);
        form.started = remembered.started || null;
        form.chooseKind(remembered.kind);
    };

    form.show = (name) => write(form.control(name), form.value(name));

    form.touched = (name) => name in form.given && !form.untouched.has(name);
    form.suggestion = (name) => (form.suggested[name] !== undefined ? form.suggested[name] : form.defaults[name]);

    /** What a setting was before anybody touched the form. */
    form.base = (name) => (name in form.filled ? form.filled[name] : form.suggestion(name));

    form.value = (name) =>
        form.touched(name) ? form.given[name] : name in form.own ? form.own[name] : app.follow.value(name);

    /** Put into every control what the run would use; not into the one that is being typed in. */
    form.display = function(typing) {
        let changed = 0;
        const groups = {};
        app.ways.follow();
        form.controls().forEach((control) => {
            const name = control.dataset.setting;
            const reset = document.querySelector(`#lora_trainer [data-reset="${name}"]`);
            if (name !== typing) write(control, form.value(name));
            const own = name in form.given && app.ways.fits(name) && !control.closest(".lora_trainer_steps");
            const group = control.closest("[data-group]");
            app.show(reset, own);
            if (own) changed += 1;
            if (own && group) groups[group.dataset.group] = (groups[group.dataset.group] || 0) + 1;
        });
        document.querySelectorAll("#lora_trainer [data-changed]").forEach((node) => {
            const count = groups[node.dataset.changed];
            app.setText(node, count ? app.t("{n} changed", {n: count}) : "");
        });
        app.follow.show();
        app.setText(app.get("changed"), changed ? app.t("{n} changed", {n: changed}) : "");
        document.querySelectorAll("#lora_trainer [data-hint]").forEach((node) => app.show(node, node.dataset.hint === form.kind()));
        showOrigin();
    };

    /** What the training begins with, and the way back from it. */
    function showOrigin() {
        const origin = app.get("origin");
        const {continues, left} = form;
        app.show(origin, continues || left);
        const key = JSON.stringify([continues, left]);
        if (origin.dataset.key === key) return;
        origin.dataset.key = key;
        const change = (to) => () => {
            Object.assign(form, to);
            form.changed();
        };
        if (continues) {
            origin.replaceChildren(app.t("Continues from {name}: its LoRA is the beginning.", continues), " ",
                app.button("Begin anew instead", change({continues: null}), "link"));
        } else if (left) {
            origin.replaceChildren(app.t("Other pictures: this does not continue from {name} any more.", left), " ",
                app.button("Continue from it all the same", () => change({continues: {...left, pictures: app.pictures.chosen}, left: null})(), "link"));
        }
    }

    /** Pictures were chosen: a training that was to continue another one's does so with its pictures alone. */
    form.picturesChosen = function(folder) {
        const {continues, left} = form;
        if (!folder) return;
        if (continues && !continues.pictures) continues.pictures = folder;
        if (continues && continues.pictures !== folder) Object.assign(form, {continues: null, left: continues});
        else if (left && left.pictures === folder) Object.assign(form, {continues: left, left: null});
    };

    // Settings without a control, which a settings file can have: kept as they came.
    const UNSEEN = ["plugins", "augmentations", "regularisers", "text_encoders"];

    /** What the API gets: everything that differs from the defaults or was chosen. */
    form.settings = function() {
        const settings = {};
        UNSEEN.filter((name) => name in form.given).forEach((name) => { settings[name] = form.given[name]; });
        form.controls().forEach(({dataset: {setting: name}}) => {
            const value = form.value(name);
            if (!app.ways.fits(name)) return;
            if (form.touched(name) || !same(value, form.defaults[name])) settings[name] = value;
        });
        if (settings.max_train_steps && !("epochs" in form.given)) delete settings.epochs; // only suggested, and without effect
        const task = form.task();
        if (task !== "words") settings.train_data_dir = form.data() || "";
        if (task !== "image") settings.task = task;
        return settings;
    };

    /** Take over settings by name, as of an earlier run or a YAML file; everything else goes back to its suggestion. */
    form.fill = function(settings, {continues = null} = {}) {
        const {train_data_dir: folder, task, ...rest} = settings;
        form.chooseKind(app.ways.kindOf(settings));
        app.ways.follow(); // before the base model is taken over
        form.given = {};
        form.filled = {};
        form.suggested = {};
        form.own = {};
        Object.assign(form, {continues, left: null});
        for (const [name, value] of Object.entries(rest)) {
            if (name in form.defaults && !same(value, form.defaults[name])) form.given[name] = value;
            if (app.follow.concerns(name)) form.filled[name] = value;
            if (UNSEEN.includes(name) && value && Object.keys(value).length) form.given[name] = value;
        }
        form.untouched = new Set(Object.keys(form.filled));
        form.faithful = true;
        form.clearProblems();
        if (folder) ({text: app.texts, image: app.pictures}[form.task()] || app.pair).choose(folder);
        else form.changed();
    };

    // -- problems, beside what they concern

    form.problem = function(name, text) {
        const place = app.get("problem_" + name);
        if (!place) return false;
        app.setText(place, text || "");
        app.show(place, Boolean(text));
        const control = form.control(name);
        if (control) control.setAttribute("aria-invalid", String(Boolean(text)));
        if (text) {
            for (let node = place.parentElement; node && node.id !== "lora_trainer"; node = node.parentElement) {
                if (node.tagName === "DETAILS") node.open = true;
            }
        }
        return true;
    };

    /** Where it is said what is wrong with a setting, in the order of the page. */
    form.problemPlaces = () => Array.from(document.querySelectorAll("#lora_trainer_tab_train [id^=lora_trainer_problem_]"))
        .filter((node) => node.id !== "lora_trainer_problem_yaml");

    /** Take the keyboard to the first setting that is wrong. */
    form.goToProblem = function() {
        const place = form.problemPlaces().find((node) => !node.hidden);
        if (!place) return;
        const name = place.id.slice("lora_trainer_problem_".length);
        const control = name === "" ? app.get("start") : form.control(name) || app.get("files"); // pictures have no field
        control.focus({preventScroll: true});
        place.scrollIntoView({block: "center", behavior: "smooth"});
    };

    form.clearProblems = function() {
        form.problemPlaces().forEach((node) => app.show(node, false));
        form.controls().forEach((control) => control.removeAttribute("aria-invalid"));
        document.querySelectorAll("#lora_trainer .lora_trainer_overwrite").forEach((node) => node.remove());
    };

    /** Each problem beside its field; what has none stands under Start. */
    form.showProblems = function(problems) {
        form.clearProblems();
        problems.forEach(form.showProblem);
    };

    form.showProblem = function(problem) {
        const known = problem.field && form.problem(problem.field, app.sentence(problem));
        if (!known) form.problem("", app.named(problem));
        if (form.saysTaken(problem)) offerToReplace();
    };

    form.saysTaken = (problem) => problem.field === "output_name" && / already\.$/.test(problem.message);

    function offerToReplace() {
        const replace = app.button("Replace it", () => {
            form.set("overwrite", true);
            replace.remove();
        });
        replace.classList.add("lora_trainer_overwrite");
        app.get("problem_output_name").after(replace);
    }

    // -- what fits

    form.suggest = async function(pictures, family, signal) {
        const query = new URLSearchParams();
        if (pictures) query.set("pictures", pictures);
        if (family) query.set("family", family);
        const {presets} = await app.fetchJson("/presets?" + query, signal);
        const preset = presets.find((one) => one.kind === form.kind());
        const fits = form.faithful ? {} : preset.settings;
        const own = form.faithful ? {} : await form.ownDefaults();
        if (signal.aborted) return; // something was changed meanwhile, and is asked for
        form.own = own;
        const {trigger_word, output_name, save_steps, preview_prompts} = form.suggested;
        form.suggested = {trigger_word, output_name, save_steps, preview_prompts, ...fits};
    };

    /** The settings that the host's settings page gives every new training. */
    form.ownDefaults = async function() {
        const yaml = (typeof opts === "undefined" ? "" : opts.lora_trainer_defaults || "").trim();
        if (!yaml) return {};
        try {
            const {settings, given} = await app.post("/settings/check", {yaml});
            return Object.fromEntries(given.map((name) => [name, settings[name]]));
        } catch (error) {
            app.complain(error);
            return {};
        }
    };

    form.chooseKind = function(kind) {
        const radio = document.querySelector(`input[name=lora_trainer_kind][value="${CSS.escape(kind || "")}"]`);
        if (radio) radio.checked = true;
    };
})(loraTrainer);
