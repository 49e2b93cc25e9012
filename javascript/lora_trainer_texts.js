// Step 1 of a language model: a file with rows, shown as a table with what is wrong, and what the model sees of a row.
(function(app) {
    "use strict";

    // chosen: name of an uploaded dataset, or a file or folder of the server. first: of the rows that are shown.
    const texts = (app.texts = {chosen: null, first: 0, busy: null});
    const PAGE = 50;
    const place = () => app.get("problem_train_data_dir");
    let asked = 0; // the newest request is the one that is shown

    texts.begin = function() {
        const input = app.get("text_file");
        input.addEventListener("change", () => {
            texts.add(input.files[0]);
            input.value = "";
        });
        app.dropZone(app.get("text_drop"), (dropped) => texts.add(dropped.files[0]));
        app.get("earlier_texts").addEventListener("change", (event) => event.target.value && texts.choose(event.target.value));
        listEarlier().catch((error) => app.complain(error, place()));
    };

    async function listEarlier() {
        const {datasets} = await app.fetchJson("/datasets");
        const names = datasets.filter((one) => one.texts).map((one) => one.name);
        app.get("earlier_texts").replaceChildren(
            app.el("option", {value: ""}, app.t("choose …")), ...names.map((name) => app.el("option", {value: name}, name)));
        app.show(app.get("earlier_texts_field"), names.length);
        return names;
    }

    texts.add = function(file) {
        if (!file) return null;
        const mine = (texts.busy = upload(file).catch((error) => app.complain(error, place())).finally(() => {
            if (texts.busy === mine) texts.busy = null;
        }));
        return mine;
    };

    async function upload(file) {
        const {name} = await app.post("/texts", {name: file.name, data: await app.dataUrl(file)});
        await texts.choose(name);
    }

    /** Take an uploaded file by the name of its dataset, or a path of the server. */
    texts.choose = async function(chosen) {
        texts.chosen = chosen || null;
        texts.first = 0;
        app.form.problem("train_data_dir", null);
        app.show(app.get("seen_box"), false);
        const names = await listEarlier();
        app.get("earlier_texts").value = names.includes(chosen) ? chosen : "";
        const path = app.get("text_path");
        if (path) path.value = chosen && !names.includes(chosen) ? chosen : "";
        app.form.store();
        return app.estimate.now();
    };

    /** The rows as they are with the settings of now. */
    texts.show = async function(first = texts.first) {
        const mine = ++asked;
        const table = app.get("row_table");
        app.show(table, texts.chosen);
        app.show(app.get("texts"), texts.chosen);
        if (!texts.chosen) return;
        const settings = app.form.settings();
        let found;
        try {
            found = await app.post("/texts/rows", {settings, row: first});
        } catch (error) {
            if (mine !== asked) return;
            app.show(table, false);
            app.show(app.get("texts"), false);
            throw error;
        }
        if (mine !== asked) return;
        texts.first = first;
        const {total, wrong, rows} = found;
        const counted = [app.t(total === 1 ? "1 row" : "{n} rows", {n: total}), wrong ? app.t("{n} cannot be used", {n: wrong}) : ""];
        app.get("texts").replaceChildren(app.el("b", {}, texts.chosen.split(/[\\/]/).pop()), " · " + counted.filter(Boolean).join(" · "));
        const head = [app.t("Row"), app.t("Prompt"), app.t("Answer")].map((word) => app.el("th", {}, word));
        table.replaceChildren(app.el("table", {}, app.el("thead", {}, app.el("tr", {}, ...head)),
            app.el("tbody", {}, ...rows.map((row, index) => line(row, first + index)))));
        app.show(app.get("row_pages"), total > PAGE);
        document.querySelector("#lora_trainer [data-action=rows-before]").disabled = first === 0;
        document.querySelector("#lora_trainer [data-action=rows-after]").disabled = first + PAGE >= total;
    };

    function line(row, number) {
        const problems = row.problems.map((one) => app.el("p", {class: one.severity === "error" ? "problem" : "help"}, app.sentence(one)));
        const turns = row.turns > 1 ? app.el("p", {class: "help"}, app.t("{n} answers in this row", {n: row.turns})) : null;
        const look = row.answer ? app.button("See it", () => see(number), "link") : null;
        const severe = row.problems.some((one) => one.severity === "error");
        return app.el("tr", {class: severe ? "wrong" : null},
            app.el("td", {}, row.where, " ", look), app.el("td", {}, row.prompt), app.el("td", {}, row.answer, turns, ...problems));
    }

    /** Exactly what the model sees of a row, with what it learns in another colour. */
    async function see(number) {
        const box = app.get("seen_box");
        try {
            const found = await app.post("/texts/seen", {settings: app.form.settings(), row: number});
            const cut = found.cut ? " " + app.t("{n} more are cut.", {n: found.cut}) : "";
            app.setText(app.get("seen_title"), app.t("{where}: {tokens} tokens, of which the coloured {learned} are learned.", found) + cut);
            app.get("seen").replaceChildren(...found.segments.map(({text, learned}) => (learned ? app.el("mark", {class: "learned"}, text) : app.el("span", {}, text))));
        } catch (error) {
            app.setText(app.get("seen_title"), app.reason(error));
            app.get("seen").replaceChildren();
        }
        app.show(box, true);
        box.scrollIntoView({block: "nearest", behavior: "smooth"});
    }

    /** What the server said of the rows. */
    texts.judged = function(facts) {
        app.hints("text_hints", facts.warnings);
        const held = facts.held_out ? " " + app.t("({n} only measured)", {n: facts.held_out}) : "";
        app.setText(app.get("fact_tokens"), app.t("{n} in an epoch, {learned} of them learned", {n: facts.tokens * facts.repeats, learned: facts.learned * facts.repeats}) + held);
    };

    texts.actions = {
        "use-text-path": () => texts.choose(app.unquoted(app.get("text_path").value)),
        "use-model-folder": () => app.form.set("base_model", app.unquoted(app.get("model_folder").value) || undefined),
        "rows-before": () => texts.show(Math.max(0, texts.first - PAGE)),
        "rows-after": () => texts.show(texts.first + PAGE),
    };
})(loraTrainer);
