// Presets of one's own: what is set in the form, saved under a name, chosen, renamed and deleted.
(function(app) {
    "use strict";

    // rows: as the server lists them. chosen: the name of the one that was chosen last.
    const presets = (app.presets = {rows: [], chosen: null});
    const address = (name) => "/presets/own/" + encodeURIComponent(name);
    const typed = () => app.get("preset_name").value.trim();

    presets.begin = async function() {
        app.get("preset").addEventListener("change", (event) => apply(event.target.value || null));
        await load();
        presets.choose(presets.rows.some((one) => one.name === presets.chosen) ? presets.chosen : null);
    };

    async function load() {
        ({presets: presets.rows} = await app.fetchJson("/presets/own"));
        app.get("preset").replaceChildren(
            app.el("option", {value: ""}, app.t("none")),
            ...presets.rows.map((one) => app.el("option", {value: one.name}, one.name)));
        app.show(app.get("preset_field"), presets.rows.length);
    }

    /** Name it as the one that is in use; null: none is. */
    presets.choose = function(name) {
        presets.chosen = name;
        app.get("preset").value = name || "";
        if (name) app.get("preset_name").value = name;
        app.show(app.get("preset_chosen"), name);
        app.show(app.get("preset_message"), false);
    };

    /** Put its settings into the form; what belongs to this LoRA alone, its name and pictures, stays. */
    function apply(name) {
        const preset = presets.rows.find((one) => one.name === name);
        presets.choose(name);
        if (preset && preset.problem) return say(app.said(preset.problem));
        use(preset ? preset.kind : app.form.kind(), preset ? preset.settings : {});
    }

    /** kind: which of the built-in ones the rest follows; null where the settings are complete, as an earlier run's. */
    function use(kind, settings) {
        const {form} = app;
        const kept = Object.entries(form.given).filter(([name]) => form.control(name) && !("preset" in form.control(name).dataset));
        form.given = {...Object.fromEntries(kept), ...settings};
        form.faithful = kind === null;
        const complete = form.faithful ? Object.keys(form.defaults).filter(app.follow.concerns) : [];
        form.filled = Object.fromEntries(complete.map((name) => [name, name in settings ? settings[name] : form.defaults[name]]));
        form.untouched = new Set(complete);
        form.suggested = {};
        form.own = {};
        if (kind) form.chooseKind(kind);
        form.clearProblems();
        form.changed();
    }

    /** What the form would save. */
    function current() {
        const {form} = app;
        if (form.faithful) return {kind: null, settings: form.settings()};
        return {kind: form.kind(), settings: Object.fromEntries(Object.entries(form.given).filter(([name]) => form.touched(name)))};
    }

    function say(text, ...nodes) {
        const message = app.get("preset_message");
        message.replaceChildren(text, ...nodes.flatMap((node) => [" ", node]));
        app.show(message, text);
        if (!text) return;
        for (let node = message; node && node.id !== "lora_trainer"; node = node.parentElement) {
            if (node.tagName === "DETAILS") node.open = true;
        }
    }

    async function attempt(action, name) {
        say("");
        try {
            await action();
        } catch (error) {
            if (!error.problems) throw error;
            const taken = error.problems.some((one) => one.field === "name" && / already\.$/.test(one.message));
            return say(error.problems.map(app.named).join(" "), ...(taken && action.replace ? [app.button("Replace it", action.replace)] : []));
        }
        await load();
        presets.choose(name);
        app.form.store();
    }

    function save() {
        const name = typed();
        const put = (overwrite) => app.post("/presets/own", {name, ...current(), overwrite});
        const action = () => put(false);
        action.replace = () => attempt(() => put(true), name);
        return attempt(action, name);
    }

    function askToDelete() {
        const name = presets.chosen;
        say(app.t("This deletes the preset {name}. Runs and LoRAs stay.", {name}),
            app.button("Delete it", () => attempt(() => app.call("DELETE", address(name), {confirm: true}), null), "danger"),
            app.button("Keep it", () => say("")));
    }

    presets.actions = {
        "preset-save": save,
        "preset-rename": () => attempt(() => app.post(address(presets.chosen) + "/rename", {name: typed()}), typed()),
        "preset-delete": askToDelete,
    };
})(loraTrainer);
