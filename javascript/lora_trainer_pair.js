// Step 1 of a change that pictures show: a pair, folders with pairs, or a folder of something and one of its opposite.
(function(app) {
    "use strict";

    // chosen: name of the pair's dataset, or a folder with pairs. shown: its pictures by place, of a pair that was put
    // together here. folder: of pictures of something, for a slider. sent: what came along with a picture.
    const pair = (app.pair = {chosen: null, shown: {}, folder: null, sent: {}, busy: null});
    const PLACES = ["before", "after"];
    const place = () => app.get("problem_train_data_dir");
    let changes = Promise.resolve();

    pair.begin = function() {
        for (const where of PLACES) {
            const input = app.get(where + "_file");
            input.addEventListener("change", () => {
                if (input.files[0]) pair.put(where, input.files[0]);
                input.value = "";
            });
            app.dropZone(app.get(where + "_drop"), (dropped) => dropped.files[0] && pair.put(where, dropped.files[0]));
        }
        app.get("pair_prompt").addEventListener("change", (event) => inTurn(() => describe(event.target.value)));
        app.get("pair_folder").addEventListener("keydown", (event) => event.key === "Enter" && pair.actions["use-pairs"]());
        app.get("slider_folder").addEventListener("change", (event) => {
            pair.folder = app.unquoted(event.target.value) || null;
            app.form.problem("train_data_dir", null);
            app.form.changed();
        });
    };

    /** The names of the datasets that are here, for the folders. */
    pair.listKnown = function(datasets) {
        app.get("known_sets").replaceChildren(...datasets.filter((one) => one.pictures).map((one) => app.el("option", {value: one.name})));
    };

    /** Change the pair, one change after another; Start waits for them. */
    function inTurn(change) {
        const mine = (pair.busy = changes = changes.then(change)
            .catch((error) => app.complain(error, place()))
            .finally(() => {
                app.show(app.get("pair_upload"), false);
                if (pair.busy === mine) pair.busy = null;
            }));
        return mine;
    }

    /** Put a file into its place. sent: what comes along, {caption, resolution, base_model}. */
    pair.put = (where, file, sent = {}) => inTurn(() => upload(where, file, sent));

    async function upload(where, file, sent) {
        app.form.problem("train_data_dir", null);
        app.setText(app.get("pair_upload"), app.t("Uploading {name} …", {name: file.name}));
        app.show(app.get("pair_upload"), true);
        const large = app.tooLarge(file);
        if (large) throw new app.ServerError(0, large);
        const dataset = pair.shown.before || pair.shown.after ? pair.chosen : null;
        const picture = {name: file.name, data: await app.dataUrl(file), caption: sent.caption || ""};
        const {name} = await app.post("/pairs", {dataset, place: where, picture, free: !pair.shown[where]});
        comesAlong(sent);
        await pair.take(name);
        await app.pictures.listEarlier();
    }

    /** The size and the base model of a picture that was drawn here; what came with an earlier one goes. */
    function comesAlong({caption, ...sent}) {
        const {given} = app.form;
        for (const [name, value] of Object.entries(pair.sent)) if (given[name] === value) delete given[name];
        for (const [name, value] of Object.entries(sent)) {
            if (value === undefined) delete given[name];
            else given[name] = value;
        }
        pair.sent = sent;
    }

    pair.remembered = () => ({chosen: pair.chosen, folder: pair.folder, sent: pair.sent});

    pair.restore = function({chosen, folder, sent}) {
        Object.assign(pair, {folder: folder || null, sent: sent || {}});
        return pair.take(chosen);
    };

    /** Take what a run learned from: pairs, or pictures of something. */
    pair.choose = function(chosen) {
        if (app.form.task() !== "slider") return pair.take(chosen);
        pair.folder = chosen || null;
        return pair.take(pair.chosen);
    };

    /** Take a pair by the name of its dataset, or a folder with pairs. */
    pair.take = async function(chosen) {
        pair.chosen = chosen || null;
        pair.shown = {};
        app.form.problem("train_data_dir", null);
        if (chosen && !/[\\/]/.test(chosen)) {
            const {name, ...shown} = await app.fetchJson(`/datasets/${encodeURIComponent(chosen)}/pair`).catch(() => ({}));
            if (pair.chosen !== chosen) return null; // another was chosen meanwhile
            if (name) pair.shown = shown;
        }
        show();
        app.form.store();
        return app.estimate.now();
    };

    function show() {
        for (const where of PLACES) {
            const picture = app.get(where + "_picture");
            const row = pair.shown[where];
            app.show(picture, row);
            if (row) picture.src = `${app.thumbnailUrl(pair.chosen, row.file)}?${row.size}`;
            else picture.removeAttribute("src");
        }
        const own = Boolean(pair.shown.before || pair.shown.after);
        app.show(app.get("pair_prompt_field"), own);
        const prompt = app.get("pair_prompt");
        if (prompt !== document.activeElement) prompt.value = pair.prompt(); // what is being typed stays
        app.get("pair_folder").value = own ? "" : pair.chosen || "";
        app.get("pair_folders").open = Boolean(pair.chosen && !own);
        app.get("slider_folder").value = pair.folder || "";
        app.show(app.get("pair_judged"), false);
        app.show(app.get("pair_hints"), false);
    }

    const rows = () => PLACES.map((where) => pair.shown[where]).filter(Boolean);

    /** What both pictures show. */
    pair.prompt = () => rows().map((row) => row.caption.trim()).find(Boolean) || "";

    /** Another prompt; where a run knows the pair with the old one, the server makes another pair. */
    async function describe(text) {
        const {chosen} = pair;
        if (!rows().length) return;
        const {name} = await app.post(`/datasets/${encodeURIComponent(chosen)}/pair`, {prompt: text.trim()});
        if (pair.chosen !== chosen) return; // another was chosen meanwhile
        await pair.take(name);
        if (name !== chosen) await app.pictures.listEarlier();
    }

    /** What the settings name as pictures; nothing until both of a pair are there. */
    pair.data = function(task) {
        if (task === "slider") return pair.folder;
        return rows().length === 1 ? null : pair.chosen;
    };

    pair.judged = function(facts) {
        const line = app.get("pair_judged");
        app.setText(line, app.t(facts.task === "pair" ? "{n} pictures in pairs" : "{n} pictures of both", {n: facts.pictures}));
        app.show(line, facts.pictures > (facts.task === "pair" ? 2 : 0));
        app.hints("pair_hints", facts.warnings);
    };

    pair.actions = {
        "use-pairs": () => pair.take(app.unquoted(app.get("pair_folder").value)),
    };
})(loraTrainer);
