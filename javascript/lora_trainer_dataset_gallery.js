// The Dataset sub-tab's gallery: a page of pictures at a time, filters, the selection.
(function(app) {
    "use strict";

    const PAGE = 48;
    const TYPING_MS = 80;
    const editor = app.editor;

    // index: of the picture in hand within rows. filter: see the API's FilterModel.
    const gallery = (editor.gallery = {rows: [], total: 0, offset: 0, index: 0, selected: new Set(), filter: {}});
    let asked = 0;
    let typing = null;

    gallery.begin = function() {
        const later = () => {
            clearTimeout(typing);
            typing = setTimeout(() => editor.act(() => gallery.filtered()), TYPING_MS);
        };
        app.get("editor_text").addEventListener("input", later);
        app.get("editor_state").addEventListener("change", later);
        app.get("editor_kind").addEventListener("change", later);
        app.get("editor_tag").addEventListener("keydown", (event) => {
            if (event.key !== "Enter") return;
            event.preventDefault();
            const tag = event.target.value.trim();
            event.target.value = "";
            if (tag) gallery.want(app.get("editor_how").value, tag);
        });
        app.get("editor_grid").addEventListener("click", ({target, shiftKey}) => {
            const index = Array.from(app.get("editor_grid").children).indexOf(target.closest("li"));
            if (index < 0) return;
            if (target.tagName === "INPUT") select(index, target.checked, shiftKey);
            else if (target.closest("button")) editor.act(() => gallery.hold(index, true));
        });
        Object.assign(editor.actions, {
            "editor-earlier": () => editor.act(() => gallery.load(gallery.offset - PAGE)),
            "editor-later": () => editor.act(() => gallery.load(gallery.offset + PAGE)),
            "editor-select-all": () => editor.act(selectAll),
        });
    };

    gallery.forget = function() {
        gallery.selected.clear();
        gallery.filter = {};
        for (const name of ["text", "state", "kind", "tag"]) app.get("editor_" + name).value = "";
        showChips();
    };

    /** The address of a picture of the open folder; kind: thumbnails or pictures. */
    gallery.url = (row, kind) =>
        `${app.API}/editor/${editor.state.id}/${kind}/${row.file.split("/").map(encodeURIComponent).join("/")}?v=${row.version}`;

    /** What the filters say, as the API takes it. */
    gallery.wanted = () => ({
        ...gallery.filter,
        text: app.get("editor_text").value.trim(),
        state: app.get("editor_state").value,
        problem: app.get("editor_kind").value,
    });

    /** Filter by a tag, or no longer where it does already. how: tags, missing, core or mood. */
    gallery.want = function(how, tag) {
        const {filter} = gallery;
        if (how === "core" || how === "mood") filter[how] = filter[how] === tag ? "" : tag;
        else {
            const list = filter[how] || [];
            filter[how] = list.includes(tag) ? list.filter((one) => one !== tag) : [...list, tag];
        }
        showChips();
        return editor.act(() => gallery.filtered());
    };

    function showChips() {
        const {filter} = gallery;
        const chips = [];
        const chip = (how, text, tag) => chips.push(app.el("button", {
            type: "button", class: "chip", title: app.t("Take this filter away"), onclick: () => gallery.want(how, tag),
        }, text + " ×"));
        (filter.tags || []).forEach((tag) => chip("tags", tag, tag));
        (filter.missing || []).forEach((tag) => chip("missing", app.t("without {tag}", {tag}), tag));
        if (filter.core) chip("core", app.t("{tag} as core", {tag: filter.core}), filter.core);
        if (filter.mood) chip("mood", app.t("{tag} as mood", {tag: filter.mood}), filter.mood);
        app.get("editor_chips").replaceChildren(...chips);
        app.show(app.get("editor_chips"), chips.length);
    }

    gallery.filtered = async function() {
        gallery.selected.clear();
        await gallery.load(0);
    };

    /** Load the page that begins at offset. at: which of its pictures is then in hand; what was typed is kept first. */
    gallery.load = async function(offset, at = 0) {
        await editor.picture.keep();
        editor.thumbnails.forget(); // of the page that is left, they would come before the new page's
        await fetchPage(offset, at);
    };

    async function fetchPage(offset, at) {
        if (!editor.state) return; // the folder was left meanwhile
        const mine = ++asked;
        const {id} = editor.state;
        const path = `/editor/${id}/pictures?offset=${Math.max(0, offset)}&limit=${PAGE}`;
        const page = await app.post(path, gallery.wanted()).catch((error) => {
            editor.thumbnails.resume(); // the page that was to be left stays
            throw error;
        });
        if (mine !== asked || !editor.isOpen(id)) return; // a later question was answered first
        if (!page.rows.length && page.total) return void await fetchPage(PAGE * Math.floor((page.total - 1) / PAGE), at);
        Object.assign(gallery, {rows: page.rows.map(editor.picture.ahead), total: page.total, offset: page.offset});
        editor.heard(page.state);
        draw();
        const place = typeof at === "function" ? at(page.rows) : at;
        gallery.hold(Math.min(place < 0 ? page.rows.length - 1 : place, page.rows.length - 1));
    }

    /** The same page again, after captions changed; the picture in hand when the answer comes stays in hand where it is
     * still there: a key may have taken the next one meanwhile. */
    gallery.reload = () => fetchPage(gallery.offset, (rows) => {
        const place = rows.findIndex((row) => editor.row && row.file === editor.row.file);
        return place < 0 ? gallery.index : place;
    });

    function draw() {
        // Tiles that are there show the new rows, and those too many are hidden: each node that comes or goes wakes the
        // host's watchers of the page.
        const grid = app.get("editor_grid");
        const tiles = app.setCount(grid, Math.max(grid.children.length, gallery.rows.length), tile);
        tiles.forEach((node, index) => app.show(node, index < gallery.rows.length));
        gallery.rows.forEach((row, index) => fill(tiles[index], row, index));
        const none = !gallery.rows.length;
        app.show(app.get("editor_empty"), none);
        app.show(app.get("editor_detail"), !none);
        const last = gallery.offset + gallery.rows.length;
        app.setText(app.get("editor_range"), none ? "" : app.t("{first}–{last} of {total}", {first: gallery.offset + 1, last, total: gallery.total}));
        app.get("editor_earlier").disabled = !gallery.offset;
        app.get("editor_later").disabled = last >= gallery.total;
        app.show(app.get("editor_earlier"), gallery.total > PAGE);
        app.show(app.get("editor_later"), gallery.total > PAGE);
        showSelection();
    }

    const tile = () => app.el("li", {class: "tile"},
        app.el("button", {type: "button", class: "tile_button"},
            app.el("span", {class: "tile_picture"}, app.el("img", {alt: "", decoding: "async"})), app.el("span", {class: "tile_caption"})),
        app.el("input", {type: "checkbox"}), app.el("span", {class: "tile_notes"}));

    /** Show this row in the tile. */
    function fill(node, row, index) {
        const [button, box, notes] = node.children;
        const caption = row.caption || app.t("no caption");
        box.setAttribute("aria-label", app.t("Select {file}", {file: row.file}));
        box.checked = gallery.selected.has(row.file);
        button.setAttribute("aria-label", `${row.file}: ${caption}`);
        if (index === gallery.index) button.setAttribute("aria-current", "true");
        else button.removeAttribute("aria-current");
        editor.thumbnails.show(button.querySelector("img"), row);
        app.setParts(button.lastChild, row.caption ? editor.marked(row.caption) : [{text: caption}]);
        const said = [row.unsaved && app.t("not saved"), row.excluded && app.t("excluded"),
            row.problems.length && app.t(row.problems.length === 1 ? "1 problem" : "{n} problems", {n: row.problems.length})].filter(Boolean);
        app.setText(notes, said.join(" · "));
        app.show(notes, said.length);
        node.dataset.excluded = row.excluded;
        node.dataset.empty = !row.caption;
    }

    const tileAt = (index) => app.get("editor_grid").children[index];

    let anchor = 0;
    function select(index, on, range) {
        const [from, to] = range ? [Math.min(anchor, index), Math.max(anchor, index)] : [index, index];
        for (let place = from; place <= to; place++) {
            const {file} = gallery.rows[place];
            if (on) gallery.selected.add(file);
            else gallery.selected.delete(file);
            tileAt(place).querySelector("input").checked = on;
        }
        anchor = index;
        showSelection();
    }

    async function selectAll() {
        if (gallery.selected.size) gallery.selected.clear();
        else (await app.post(`/editor/${editor.state.id}/keys`, gallery.wanted())).files.forEach((file) => gallery.selected.add(file));
        gallery.rows.forEach((row, index) => (tileAt(index).querySelector("input").checked = gallery.selected.has(row.file)));
        showSelection();
    }

    function showSelection() {
        const count = gallery.selected.size;
        const text = count
            ? app.t(count === 1 ? "1 selected picture" : "{n} selected pictures", {n: count})
            : app.t(gallery.total === editor.state.pictures ? "all {n} pictures" : "the {n} pictures that pass the filter", {n: gallery.total});
        app.setText(app.get("editor_scope"), app.t("Concerns: {which}", {which: text}));
        app.setText(app.get("editor_caption_scope"), app.t("Concerns: {which}", {which: text}));
        app.setText(app.get("editor_select_all"), app.t(count ? "Select none" : "Select all"));
    }

    /** Which pictures a change of many concerns, as the API takes it. */
    gallery.scope = () => (gallery.selected.size ? {files: Array.from(gallery.selected)} : {filter: gallery.wanted()});

    /** The same as a list of files. */
    gallery.scopeFiles = async function() {
        if (gallery.selected.size) return Array.from(gallery.selected);
        return (await app.post(`/editor/${editor.state.id}/keys`, gallery.wanted())).files;
    };

    /** Take a picture of this page in hand. */
    gallery.hold = function(index, focus) {
        const old = tileAt(gallery.index);
        if (old) old.firstChild.removeAttribute("aria-current");
        gallery.index = Math.max(0, index);
        const row = gallery.rows[gallery.index] || null;
        const node = tileAt(gallery.index);
        if (node) {
            node.firstChild.setAttribute("aria-current", "true");
            if (focus || app.get("editor_grid").contains(document.activeElement)) node.firstChild.focus({preventScroll: true});
            revealing = revealing || requestAnimationFrame(reveal);
        }
        return editor.picture.hold(row, gallery.offset + gallery.index + 1, gallery.total);
    };

    // Places are read when the page is laid out anyway: reading them before would lay it out once more.
    let revealing = null;
    function reveal() {
        revealing = null;
        const [grid, node] = [app.get("editor_grid"), tileAt(gallery.index)];
        if (!node) return;
        const above = node.offsetTop - grid.scrollTop;
        if (above < 0 || above + node.offsetHeight > grid.clientHeight) grid.scrollTop = node.offsetTop - grid.clientHeight / 2 + node.offsetHeight / 2;
    }

    gallery.focus = function() {
        const node = tileAt(gallery.index);
        if (node) node.firstChild.focus({preventScroll: true});
    };

    /** One picture on or back, over the page's edge. */
    gallery.walk = async function(way) {
        const next = gallery.index + way;
        if (next >= 0 && next < gallery.rows.length) await gallery.hold(next);
        else if (way > 0 && gallery.offset + next < gallery.total) await gallery.load(gallery.offset + PAGE);
        else if (way < 0 && gallery.offset > 0) await gallery.load(gallery.offset - PAGE, -1);
        else return;
        gallery.focus();
    };

    /** Take a picture in hand by its name, wherever it is; filters that hide it end. */
    gallery.show = async function(file) {
        let place = gallery.rows.findIndex((row) => row.file === file);
        if (place >= 0) return gallery.hold(place);
        const {files} = await app.post(`/editor/${editor.state.id}/keys`, gallery.wanted());
        place = files.indexOf(file);
        if (place < 0) {
            gallery.forget();
            place = (await app.post(`/editor/${editor.state.id}/keys`, {})).files.indexOf(file);
        }
        return place < 0 ? null : gallery.load(PAGE * Math.floor(place / PAGE), place % PAGE);
    };

    /** Rows as they are now, for those that this page shows. */
    gallery.merge = function(rows) {
        for (const row of rows.map(editor.picture.ahead)) {
            const index = gallery.rows.findIndex((one) => one.file === row.file);
            if (index < 0) continue;
            gallery.rows[index] = row;
            fill(tileAt(index), row, index);
            if (index === gallery.index) editor.picture.follow(row);
        }
    };
})(loraTrainer);
