// What a run would take, asked anew after every change; and Start.
(function(app) {
    "use strict";

    const DELAY = 500; // ms after the last change
    const estimate = (app.estimate = {pictures: null, family: null, resolution: null});
    let timer = null;
    let running = null;

    estimate.soon = function() {
        clearTimeout(timer);
        timer = setTimeout(estimate.now, DELAY);
    };

    /** Asks now. Resolves when the numbers follow the last change: what asks anew meanwhile is waited for, too. */
    estimate.now = async function() {
        clearTimeout(timer);
        timer = null;
        if (running) running.controller.abort();
        const controller = new AbortController();
        const mine = (running = {controller, done: ask(controller.signal)});
        mine.done.finally(() => {
            if (running === mine) running = null;
        });
        await estimate.settled();
    };

    /** Resolves when nothing waits to be asked or is being asked. */
    estimate.settled = async function() {
        while (timer !== null || running) await (timer !== null ? estimate.now() : running.done);
    };

    async function ask(signal) {
        try {
            // Twice when the first answer says how many pictures there are, or another family: what fits depends on it.
            for (let round = 0; round < 2; round++) {
                await app.form.suggest(estimate.pictures, estimate.family, signal);
                if (signal.aborted) return;
                app.form.display(focused());
                if (!app.form.data()) return showNothing();
                const settings = app.form.settings();
                if (settings.task === "text") await app.texts.show();
                const facts = await app.post("/estimate", {settings}, signal);
                const known = facts.pictures === estimate.pictures && facts.family === estimate.family;
                Object.assign(estimate, {pictures: facts.pictures, family: facts.family});
                if (!known && round === 0) continue;
                app.form.clearProblems();
                if (app.form.told) app.form.showProblem(app.form.told);
                show(facts);
                if (facts.name_taken && settings.output_name !== app.form.started) app.form.showProblem({field: "output_name", message: facts.name_taken, remedy: app.t("Choose another name, or allow overwriting it.")});
                return;
            }
        } catch (error) {
            if (error.name === "AbortError") return;
            showNothing();
            if (app.form.task() === "image" && app.pictures.allOut()) return app.pictures.judged({pictures: 0, problems: [], refused: [], warnings: []});
            if (app.form.task() === "image") app.pictures.notJudged();
            if (error.problems) app.form.showProblems(error.problems);
            else app.complain(error);
        }
    }

    /** The setting that is being typed in: its text is left alone. */
    const focused = () => (document.activeElement && document.activeElement.dataset.setting) || undefined;

    function show(facts) {
        app.setText(app.get("fact_sum"), app.sum(facts));
        app.setText(app.get("fact_steps"), String(facts.steps));
        app.setText(app.get("fact_buckets"), sizes(facts.buckets));
        const said = (text, basis) => (basis === null ? app.t("{what} (forecast)", {what: text}) : text);
        const later = app.t("known after the first steps");
        showTime(facts, later);
        app.setText(app.get("fact_memory"), facts.memory === null ? later : said(app.bytes(facts.memory), facts.memory_basis));
        estimate.resolution = facts.resolution;
        judge(facts);
        suggestSaving(facts.steps);
        app.form.display(focused());
    }

    /** What the server said of what is learned from. */
    function judge(facts) {
        if (facts.task === "words") app.hints("word_hints", facts.warnings);
        else ({text: app.texts, image: app.pictures}[facts.task] || app.pair).judged(facts);
    }

    const PARTS = {
        training: "training", previews: "previews", encoding: "encoding pictures and captions", loading: "loading",
        known: "drawing what the model knows", saving: "saving", ending: "publishing",
    };

    /** From when to when, what that rests on, and what would shorten it where it is long. */
    function showTime(facts, later) {
        const place = app.get("fact_time");
        app.show(app.get("shorter"), facts.shorter.length);
        place.removeAttribute("title");
        if (facts.minutes === null) return app.setText(place, later);
        const time = app.between(facts.minutes_low, facts.minutes_high);
        app.setText(place, facts.basis === null ? app.t("{what} (forecast)", {what: time}) : app.t("{time}, as {name} took", {time, name: facts.basis_name}));
        const parts = Object.entries(facts.parts).filter(([name]) => name in PARTS).sort((one, other) => other[1] - one[1]);
        place.title = parts.map(([name, minutes]) => `${app.t(PARTS[name])}: ${app.about(minutes)}`).join("\n");
        if (!facts.shorter.length) return;
        const ways = facts.shorter.map(({name, value, minutes}) => app.t("{name} {value} ({time})", {name: app.form.label(name), value, time: app.about(minutes)}));
        app.setText(app.get("shorter"), app.t("A processor is slow with pictures of this size. It would be shorter with {ways}, or on a graphics card.", {ways: ways.join(app.t(" or "))}));
    }

    function firstPrompt() {
        const task = app.form.task();
        if (task === "words") return app.form.value("original_prompt");
        if (task === "pair") return app.pair.prompt();
        return task === "image" ? app.pictures.firstCaption() || app.form.value("trigger_word") : "";
    }

    /** A run is saved and drawn four times, so that the best moment can be chosen by its pictures. */
    function suggestSaving(steps) {
        if (app.form.faithful) return;
        const change = app.ways.isChange(app.form.task()); // whose moment is not chosen, but its weight
        app.form.suggested.save_steps = app.form.given.save_epochs || steps < 8 || change ? undefined : Math.ceil(steps / 4);
        const prompt = firstPrompt();
        app.form.suggested.preview_prompts = prompt ? [prompt] : undefined;
    }

    function sizes(buckets) {
        const named = [...buckets]
            .sort((one, other) => other.images - one.images)
            .map((bucket) => bucket.resolution.join("×"));
        const more = named.length - 2;
        return named.slice(0, 2).join(", ") + (more > 0 ? " " + app.t("and {n} more", {n: more}) : "");
    }

    function showNothing() {
        ["sum", "steps", "buckets", "tokens", "time", "memory"].forEach((name) => app.setText(app.get("fact_" + name), "–"));
        app.show(app.get("shorter"), false);
    }

    /** Start: the server checks everything once more and says what is wrong, beside the field. */
    estimate.start = async function() {
        const button = app.get("start");
        button.disabled = true;
        app.setText(button, app.t("Starting …"));
        let wrong = false;
        try {
            await Promise.all([app.pictures.busy, app.texts.busy, app.pair.busy]);
            await estimate.settled(); // what is suggested follows the last change, too
            app.live.askForNotifications();
            const {continues} = app.form;
            const settings = app.form.settings();
            // Pictures and base model are looked at before anything starts, not when its turn comes.
            const shown = settings.base_model ? null : app.get("field_base_model").dataset.selected || null;
            const {problems} = await app.post("/estimate", {settings, shown});
            if (problems.length && app.form.task() === "image" && app.pictures.rows.length && !app.pictures.captioned()) {
                throw new app.ServerError(0, {field: "trigger_word", message: app.t("Your pictures have no captions."), remedy: app.t("Give a trigger word that stands for what they show, or caption them in step 1.")});
            }
            if (problems.length) throw new app.ServerError(0, {problems});
            app.form.started = settings.output_name; // before the answer: a page may be reloaded while it comes
            app.form.store();
            const job = continues
                ? await app.post(`/jobs/${continues.id}/continue`, {changes: await changesOf(continues, settings), shown})
                : await app.post("/jobs", {settings, shown});
            app.form.clearProblems();
            app.form.continues = null;
            app.form.set("overwrite", undefined);
            app.live.follow(job.id);
            await app.live.look();
            app.live.focus(job.id);
        } catch (error) {
            app.form.started = null;
            app.form.told = (error.problems || []).find((problem) => problem.field === "base_model") || null;
            app.live.look(); // the model that is selected may be another one than the page knows
            if (error.problems) app.form.showProblems(error.problems);
            else app.complain(error);
            wrong = true;
        } finally {
            button.disabled = false;
            app.setText(button, app.t("Start training"));
        }
        if (wrong) app.form.goToProblem(); // the button, too, can be gone to again
    };

    /** What differs from the job that is continued, also where that means a default again. */
    async function changesOf({id}, settings) {
        const {settings: wanted} = await app.post("/settings/check", {settings});
        const {settings: before} = await app.post("/settings/check", {yaml: (await app.fetchJson("/jobs/" + id)).config});
        const {init_lora: its, resume, ...others} = wanted;
        return Object.fromEntries(Object.entries(others).filter(([name, value]) => JSON.stringify(value) !== JSON.stringify(before[name])));
    }

    // -- YAML

    estimate.yamlOut = async function() {
        const {yaml} = await app.post("/settings/check", {settings: app.form.settings()});
        app.get("yaml").value = yaml;
        app.show(app.get("problem_yaml"), false);
        return yaml;
    };

    estimate.yamlIn = async function() {
        try {
            const {settings, given, translation} = await app.post("/settings/check", {yaml: app.get("yaml").value});
            app.show(app.get("problem_yaml"), false);
            tellTranslation(translation);
            // What a YAML of a few settings leaves open is not emptied: model, name and trigger word stay.
            for (const name of ["base_model", "output_name", "trigger_word"]) {
                if (!given.includes(name) && name in app.form.given) settings[name] = app.form.given[name];
            }
            app.form.fill({...settings, train_data_dir: settings.train_data_dir || app.form.data() || ""});
        } catch (error) {
            tellTranslation(null);
            if (!error.problems) return app.complain(error, app.get("problem_yaml"));
            app.setText(app.get("problem_yaml"), error.problems.map(app.named).join("\n"));
            app.show(app.get("problem_yaml"), true);
        }
    };

    /** What became of the settings that were given, in which format they were read. */
    function tellTranslation(told) {
        const place = app.get("translation");
        app.show(place, told);
        if (!told) return;
        const taken = told.taken.map((one) => `${one.theirs} → ${one.ours}: ${one.value}`).join(", ");
        const lines = [app.t("Settings of {tool}, {n} taken: {list}", {tool: told.tool, n: told.taken.length, list: taken})];
        const unmet = told.unmet.map((one) => `${one.theirs}: ${one.value} (${app.said(one.reason)})`).join(", ");
        if (unmet) lines.push(app.t("Cannot be honored here: {list}", {list: unmet}));
        if (told.ignored.length) lines.push(app.t("Mean nothing here: {list}", {list: told.ignored.join(", ")}));
        place.replaceChildren(...[...lines, ...told.notes.map(app.said)].map((line) => app.el("li", {}, line)));
    }

    estimate.yamlDownload = async function() {
        const url = URL.createObjectURL(new Blob([await estimate.yamlOut()], {type: "text/yaml"}));
        app.el("a", {href: url, download: (app.form.value("output_name") || "lora") + ".yaml"}).click();
        setTimeout(() => URL.revokeObjectURL(url), 10000);
    };
})(loraTrainer);
