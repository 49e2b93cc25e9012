// Tools on finished LoRAs: forms that are sent as they stand, and what became of them.
(function(app) {
    "use strict";

    const PACE = 1000; // ms between two looks while one works
    const tools = (app.tools = {loras: [], loaded: false, told: null});

    tools.begin = function() {
        const page = app.get("tools");
        page.addEventListener("submit", (event) => event.preventDefault());
        app.get("tools_edit_lora").addEventListener("change", () => entries().catch(complain));
        new IntersectionObserver((seen) => {
            if (seen.some((one) => one.isIntersecting)) load().catch(complain); // LoRAs come and go meanwhile
        }).observe(page);
    };

    const complain = (error) => app.complain(error, app.get("tools_problem"));

    async function load() {
        const turn = shown;
        const [state, {checkpoints}] = await Promise.all([app.fetchJson("/loras"), app.fetchJson("/checkpoints")]);
        app.show(app.get("tools_problem"), false);
        tools.loras = state.loras.map((one) => one.name);
        app.show(app.get("tools_empty"), !tools.loras.length);
        for (const list of app.get("tools").querySelectorAll("[data-list]")) {
            const names = list.dataset.list === "loras" ? tools.loras : checkpoints.map((one) => one.title);
            fill(list, names, list.hasAttribute("data-usual") && app.t("a usual one"));
        }
        if (!app.get("tools_parts").children.length) [1, 2].forEach(addPart);
        if (!tools.loaded) await entries();
        tools.loaded = true;
        if (turn === shown) show(state.task);
    }

    /** The names as options; what is chosen stays so. first: what the empty choice says, where there is one. */
    function fill(list, names, first) {
        const chosen = list.value;
        list.replaceChildren(...(first ? [app.el("option", {value: ""}, first)] : []),
            ...names.map((name) => app.el("option", {value: name, selected: name === chosen}, name.replace(/\.safetensors$/, ""))));
    }

    function addPart() {
        const list = app.el("select", {"data-list": "loras", "aria-label": app.t("LoRA")});
        fill(list, tools.loras);
        const strength = app.el("input", {type: "text", inputmode: "decimal", value: "1", "aria-label": app.t("Weight")});
        const row = app.el("div", {class: "inline lora_part"}, list, strength, app.button("Another", addPart), app.button("Remove", () => {
            if (app.get("tools_parts").children.length > 2) row.remove();
        }));
        app.get("tools_parts").append(row);
    }

    /** What the chosen LoRA says of itself stands in the fields; only what is changed there is sent. */
    async function entries() {
        const lora = app.get("tools_edit_lora").value;
        const {metadata} = lora ? await app.fetchJson("/loras/metadata?name=" + encodeURIComponent(lora)) : {metadata: {}};
        for (const field of app.get("tools").querySelectorAll("[data-entry]")) {
            field.value = field.dataset.before = metadata[field.dataset.entry] || "";
        }
    }

    const number = (text) => {
        const value = Number(text.trim().replace(",", "."));
        if (!isFinite(value)) throw new app.ServerError(0, {message: app.t("{text} is no number.", {text})});
        return value;
    };

    /** What a form says; empty fields are left out. */
    function wish(form) {
        const values = {};
        for (const field of form.querySelectorAll("[data-name]")) {
            const {name, type, before} = field.dataset;
            const text = field.value.trim();
            if (before !== undefined ? text !== before : text) values[name] = type === "number" ? number(text) : text;
        }
        if (form.dataset.tool === "combine") {
            values.loras = Array.from(app.get("tools_parts").children, (row) => ({
                name: row.querySelector("select").value, strength: number(row.querySelector("input").value),
            }));
        }
        return values;
    }

    tools.actions = {
        "tools-run": async(node) => {
            const form = node.closest("form");
            const place = form.querySelector("[role=alert]");
            app.show(place, false);
            try {
                const values = wish(form);
                if (values.output === undefined && form.querySelector("[data-name=output]")) {
                    throw new app.ServerError(0, {message: app.t("Give the new LoRA a name.")});
                }
                tools.form = form;
                show(await app.post("/loras/" + form.dataset.tool, values));
            } catch (error) {
                app.complain(error, place);
            }
        },
        "tools-cancel": async() => show((await app.post("/loras/cancel")).task),
    };

    let timer = null;
    let shown = 0; // an answer that was asked for before something was shown may be older than that

    async function look() {
        const turn = shown;
        const {task} = await app.fetchJson("/loras");
        if (turn === shown) show(task);
    }

    function show(task) {
        shown++;
        clearTimeout(timer);
        const running = Boolean(task && task.status === "running");
        app.show(app.get("tools_cancel"), running && task.total);
        app.get("tools").querySelectorAll("[data-action=tools-run]").forEach((one) => (one.disabled = running));
        if (running) {
            tools.told = null;
            app.setText(app.get("tools_status"), task.total
                ? app.t("Working: {done} of {total} layers", {done: task.done, total: task.total}) : app.t("Working …"));
            timer = setTimeout(() => look().catch(complain), PACE);
            return;
        }
        if (!task || tools.told === JSON.stringify(task)) return;
        tools.told = JSON.stringify(task);
        app.get("tools_status").replaceChildren(...(task.status === "finished" ? words(task) : task.status === "cancelled" ? [app.t("Cancelled; nothing was made.")] : []));
        if (task.status === "failed") app.complain({problems: [task.error]}, tools.form ? tools.form.querySelector("[role=alert]") : app.get("tools_problem"));
        if (task.result.blocks) chart(task.result);
        if (task.result.published) app.host.refreshPicker();
        if (tools.form && task.status === "finished" && !task.result.blocks) load().catch(complain); // the lists have a new one
    }

    /** What was made, and how good it is. */
    function words({result}) {
        if (result.blocks) return [];
        const parts = [result.published
            ? app.t(app.host.hasPrompt() ? "It is in your Lora tab as {name}." : "It is in the folder of LoRAs as {name}.", {name: result.published})
            : app.el("a", {href: `${app.API}/loras/converted/${encodeURIComponent(result.file)}`, download: result.file}, app.t("Download {name}", {name: result.file}))];
        if (result.ranks) {
            const [low, high] = result.ranks;
            parts.push(" ", app.t("{layers} layers of rank {rank}.", {layers: result.layers, rank: low === high ? low : `${low}–${high}`}));
        }
        if (result.kept) parts.push(" ", app.t("{percent} % of the change is kept.", {percent: (result.kept * 100).toFixed(1)}));
        const left = (result.left_out || []).length;
        if (left) parts.push(" ", app.t("{n} layers have no place in it and were left out.", {n: left}));
        return parts;
    }

    /** A bar for each block of the model. */
    function chart({lora, blocks}) {
        const form = app.get("tools").querySelector("[data-tool=strength]");
        const highest = Math.max(...blocks.map((one) => one.strength)) || 1;
        const before = form.querySelector("table");
        const table = app.el("table", {class: "strengths"},
            app.el("caption", {}, lora.replace(/\.safetensors$/, "")),
            ...blocks.map(({name, strength}) => {
                const bar = app.el("div", {class: "strength_bar"});
                bar.style.width = (100 * strength) / highest + "%";
                return app.el("tr", {}, app.el("th", {scope: "row"}, name), app.el("td", {}, bar), app.el("td", {}, strength.toPrecision(3)));
            }));
        if (before) before.replaceWith(table);
        else form.append(table);
    }
})(loraTrainer);
