// The Dataset sub-tab's tags: cloud and table, suggestions, and changes of many captions at once.
(function(app) {
    "use strict";

    const LOAD_MS = 400;
    const CLOUD = 80;
    const TABLE = 200;
    const SUGGESTED = 5;
    const editor = app.editor;
    const tags = (editor.tags = {found: null});
    let revision = -1;
    let waiting = null;

    tags.begin = function() {
        app.get("editor_action").addEventListener("change", showFields);
        app.get("editor_panel_many").addEventListener("keydown", (event) => {
            if (event.key !== "Enter" || event.target.tagName !== "INPUT") return;
            event.preventDefault();
            editor.act(apply);
        });
        Object.assign(editor.actions, {
            "editor-apply": () => editor.act(apply),
            "editor-exclude-many": () => exclude(true),
            "editor-include-many": () => exclude(false),
        });
        showFields();
    };

    // -- counts

    /** Captions changed: count again, once they rest. */
    tags.changed = function() {
        clearTimeout(waiting);
        waiting = setTimeout(() => editor.act(load), LOAD_MS);
    };

    async function load() {
        if (!editor.state || revision === `${editor.state.id} ${editor.state.revision}`) return;
        const {id} = editor.state;
        const asked = `${id} ${editor.state.revision}`;
        const found = await app.fetchJson(`/editor/${id}/tags`);
        if (!editor.isOpen(id)) return;
        revision = asked;
        tags.found = found;
        draw();
        editor.tools.suggest();
    }

    function draw() {
        const {found} = tags;
        app.get("editor_known").replaceChildren(...found.tags.map((one) => app.el("option", {value: one.text})));
        const most = Math.max(1, ...found.tags.map((one) => one.count));
        const cloud = found.tags.slice(0, CLOUD).map((one) => {
            const node = tagButton(one, `${one.text} ${one.count}`);
            node.style.fontSize = (12 + 8 * Math.sqrt((one.count - 1) / Math.max(1, most - 1))).toFixed(1) + "px";
            return node;
        });
        const rows = found.tags.slice(0, TABLE).map((one) => app.el("tr", {},
            app.el("td", {}, tagButton(one, one.text)), app.el("td", {}, String(one.count)),
            app.el("td", {}, Math.round(100 * one.share) + " %"),
            app.el("td", {}, [one.core && app.t("core"), one.mood && app.t("mood")].filter(Boolean).join(", "))));
        const pairs = found.synonyms.map((pair) => app.el("li", {},
            app.el("span", {}, app.t("{seldom} and {often} may mean the same.", pair)),
            app.button(app.t("Write {often} everywhere", pair), () => editor.act(() => many(
                {kind: "replace", tags: [pair.seldom], value: pair.often, filter: {}})))));
        app.get("editor_tags").replaceChildren(
            ...(found.tags.length
                ? [app.el("div", {class: "help"}, app.el("span", {class: "core"}, app.t("core")), " · ",
                    app.el("span", {class: "mood"}, app.t("mood")), " · ", app.t("click a tag to filter by it"))]
                : [app.el("p", {class: "help"}, app.t("No caption yet."))]),
            app.el("div", {class: "chips"}, ...cloud),
            ...(pairs.length ? [app.el("ul", {class: "findings"}, ...pairs)] : []),
            app.el("details", {class: "quiet"}, app.el("summary", {}, app.t("As a table, {n} tags", {n: found.total})),
                app.el("table", {class: "table"},
                    app.el("thead", {}, app.el("tr", {}, ...headings().map((text) => app.el("th", {scope: "col"}, text)))),
                    app.el("tbody", {}, ...rows))),
        );
    }

    const headings = () => [app.t("Tag"), app.t("Pictures"), app.t("Share"), app.t("Mark")];

    function tagButton(one, text) {
        const kind = [one.core && "core", one.mood && "mood"].filter(Boolean).join(" ");
        return app.el("button", {type: "button", class: ("chip " + kind).trim(), onclick: () => {
            app.get("editor_old").value = one.text;
            editor.gallery.want("tags", one.text);
        }}, text);
    }

    /** Tags that the picture in hand likely lacks, each added by one click. */
    editor.suggest = function() {
        const place = app.get("editor_suggestions");
        const found = tags.found && editor.row ? tags.found.suggestions.filter((one) => one.file === editor.row.file) : [];
        app.show(place, found.length);
        place.replaceChildren(
            ...(found.length ? [app.el("span", {class: "help"}, app.t("Likely missing:"))] : []),
            ...found.slice(0, SUGGESTED).map((one) => app.el("button", {
                type: "button", class: "chip",
                title: app.t("Pictures with {because} mostly have it", {because: one.because}),
                onclick: () => editor.act(async() => {
                    await editor.picture.keep();
                    await editor.stepped(await editor.call("/edit", {kind: "add", value: one.tag, files: [one.file]}));
                }),
            }, "+ " + one.tag)),
        );
    };

    // -- many at once

    function showFields() {
        const action = app.get("editor_action").value;
        app.get("editor_panel_many").querySelectorAll("[data-needed]").forEach((node) =>
            app.show(node, node.dataset.needed.split(" ").includes(action)));
    }

    async function apply() {
        const kind = app.get("editor_action").value;
        const split = (text) => text.split(/[,，、\n]/).map((one) => one.trim()).filter(Boolean);
        await many({
            kind,
            tags: split(app.get("editor_old").value),
            value: kind === "mark" ? app.get("editor_mark").value : app.get("editor_value").value,
            place: app.get("editor_place").value,
            pattern: app.get("editor_pattern").value,
            ...editor.gallery.scope(),
        });
    }

    async function many(wish) {
        await editor.picture.keep();
        const answer = await editor.call("/edit", wish);
        editor.gallery.merge(answer.rows);
        if (answer.changed > answer.rows.length) await editor.gallery.reload();
        told(answer.changed, app.t(answer.changed === 1 ? "1 caption changed." : "{n} captions changed.", {n: answer.changed}));
    }

    const exclude = (excluded) => editor.act(async() => {
        const files = await editor.gallery.scopeFiles();
        const answer = await editor.call("/pictures/edit", {files, excluded});
        editor.gallery.merge(answer.rows);
        if (answer.changed > answer.rows.length) await editor.gallery.reload();
        told(answer.changed, app.t(answer.changed === 1 ? "1 picture changed." : "{n} pictures changed.", {n: answer.changed}));
    });

    const told = (changed, text) => editor.say(text, ...(changed ? [app.button("Undo", () => editor.undo("undo"))] : []));
})(loraTrainer);
