// Joins the parts once the host's page is there.
(function(app) {
    "use strict";

    const ACTIONS = {
        "start": () => app.estimate.start(),
        "use-folder": () => app.pictures.choose(app.unquoted(app.get("folder").value)),
        "reset": (button) => app.form.set(button.dataset.reset, undefined),
        "yaml-out": () => app.estimate.yamlOut(),
        "yaml-in": () => app.estimate.yamlIn(),
        "yaml-download": () => app.estimate.yamlDownload(),
        "runs-more": () => app.runs.load(true).catch((error) => app.complain(error, app.get("runs_count"))),
    };

    /** Show a sub-tab by its title: gradio's own buttons, found by what they open. */
    app.openSubTab = function(title) {
        const tabs = Array.from(document.querySelectorAll("#lora_trainer_tabs > .tabitem"));
        const index = tabs.findIndex((tab) => tab.id === "lora_trainer_tab_" + title.toLowerCase());
        const buttons = document.querySelectorAll("#lora_trainer_tabs > .tab-nav button");
        if (buttons[index]) buttons[index].click();
    };

    /** What can be trained, in the list of base models: the host's checkpoints, or its language models. */
    const fillModels = (app.fillModels = async function() {
        const task = app.form.task();
        const {checkpoints, has_one: hasOne} = task === "text" ? await languageModels() : await app.fetchJson("/checkpoints");
        if (task !== app.form.task()) return; // another kind was chosen meanwhile
        const selected = checkpoints.find((one) => one.selected);
        const none = task === "text" ? app.t("no language model found") : app.t("no base model found");
        const own = hasOne ? app.t("the model that is selected") : checkpoints.length ? app.t("choose …") : none;
        const text = selected ? app.t(selected.loaded ? "{name} (loaded)" : "{name} (selected)", {name: selected.title}) : own;
        const list = app.get("field_base_model");
        const key = task + JSON.stringify(checkpoints);
        if (list.dataset.key === key) return;
        list.dataset.key = key;
        list.dataset.selected = selected ? selected.title : "";
        list.replaceChildren(
            app.el("option", {value: ""}, text),
            ...checkpoints.filter((one) => !one.selected).map((one) => app.el("option", {value: one.title}, one.title)),
        );
        if (!hasOne && !selected && checkpoints.length === 1 && !app.form.value("base_model")) app.form.set("base_model", checkpoints[0].title);
        app.form.show("base_model");
    });

    async function languageModels() {
        const {names} = await app.fetchJson("/language-models");
        return {checkpoints: names.map((title) => ({title})), has_one: false};
    }

    let known = null;

    /** The host's selected model, as every look at the server says it: the page shows and counts with no other. */
    app.knowBase = async function(base) {
        const before = known;
        known = base;
        if (JSON.stringify(base) === JSON.stringify(before)) return;
        if (app.live.switchesBack && base && before && base.title !== before.title) {
            app.live.switchesBack = false;
            app.host.showCheckpoint(base.title);
        }
        await fillModels();
        if (before && base && base.title !== before.title && !app.form.value("base_model")) app.estimate.soon();
    };

    /** The words of the page as it comes from the server; see app.isOurs. */
    function translate(page) {
        for (const block of page.querySelectorAll(".lora_trainer_page")) {
            const texts = document.createTreeWalker(block, NodeFilter.SHOW_TEXT);
            while (texts.nextNode()) {
                const node = texts.currentNode;
                const text = node.data.trim();
                if (text && node.parentNode.nodeName !== "TEXTAREA") node.data = node.data.replace(text, () => app.t(text));
            }
        }
        for (const name of ["title", "placeholder", "aria-label"]) {
            page.querySelectorAll(`[${name}]`).forEach((node) => node.setAttribute(name, app.t(node.getAttribute(name))));
        }
    }

    async function begin() {
        if (app.begun || !app.get("form")) return;
        app.begun = true;
        const page = document.getElementById("lora_trainer");
        page.addEventListener("click", (event) => {
            const button = event.target.closest("[data-action]");
            if (!button) return;
            event.preventDefault(); // a button inside a label must not also toggle its field
            const actions = [ACTIONS, app.pair.actions, app.texts.actions, app.presets.actions, app.tools.actions, app.editor.actions];
            const action = actions.find((some) => button.dataset.action in some)[button.dataset.action];
            Promise.resolve(action(button)).catch((error) => app.complain(error));
        });
        translate(page);
        app.get("form").addEventListener("submit", (event) => event.preventDefault());
        app.get("form").addEventListener("click", (event) => { // of the chosen kind, too: back to what it suggests
            if (event.target.name !== "lora_trainer_kind") return;
            app.form.faithful = false;
            app.presets.choose(null);
            app.form.changed();
        });
        app.get("folder") && app.get("folder").addEventListener("keydown", (event) => event.key === "Enter" && ACTIONS["use-folder"]());
        app.get("yaml_file").addEventListener("change", async(event) => {
            app.get("yaml").value = await event.target.files[0].text();
            event.target.value = "";
            app.estimate.yamlIn();
        });
        app.form.begin();
        app.pictures.begin();
        app.texts.begin();
        app.pair.begin();
        app.ways.begin();
        app.runs.begin();
        app.tools.begin();
        app.search.begin();
        app.editor.begin();
        app.strip.begin();
        app.live.begin();
        app.host.addSendButtons();
        const remembered = app.recall("form");
        app.presets.chosen = (remembered && remembered.preset) || null;
        app.form.restore(remembered || {});
        app.form.changed();
        // The host fetches its options after its page is there. A kind that is set anew there counts once.
        if (typeof onOptionsAvailable === "function") {
            onOptionsAvailable(() => {
                const before = app.recall("kind_option");
                app.remember("kind_option", opts.lora_trainer_kind);
                if (remembered && (!before || before === opts.lora_trainer_kind)) return;
                app.form.chooseKind(opts.lora_trainer_kind);
                app.form.changed();
            });
        }
        app.presets.begin().catch((error) => app.live.complain(error));
        await fillModels();
        if (remembered && remembered.folder) await app.pictures.choose(remembered.folder);
        if (remembered && remembered.pair) await app.pair.restore(remembered.pair);
        if (remembered && remembered.texts) await app.texts.choose(remembered.texts);
    }

    /** The tab is opened: another model may have been selected meanwhile, or its list read anew. */
    function opened() {
        const tab = typeof get_uiCurrentTabContent === "function" && get_uiCurrentTabContent();
        if (!app.begun || !tab || tab.id !== "tab_lora_trainer") return;
        app.live.look();
        fillModels().catch((error) => app.live.complain(error));
    }

    const whenReady = () => begin().catch((error) => app.live.complain(error));
    if (typeof onUiLoaded === "function") onUiLoaded(whenReady);
    else document.addEventListener("DOMContentLoaded", whenReady);
    if (typeof onUiTabChange === "function") onUiTabChange(opened);
    // Another checkpoint at the top is an option of the host's that changes.
    if (typeof onOptionsChanged === "function") onOptionsChanged(() => app.begun && app.live.look());
})(loraTrainer);
