// The Dataset sub-tab's picture in hand: large, with its caption, its tags, and what the tokenizer reads.
(function(app) {
    "use strict";

    const PREVIEW_MS = 200;
    const SIDES = [640, 1024]; // least and most pixels of the canvas's longer side
    const editor = app.editor;
    const picture = (editor.picture = {});
    let image = null; // what is drawn, with the row it belongs to
    let previewing = null;
    let asked = 0;
    let names = []; // of the caption's tags, as they are shown
    let chosen = null; // the tag of the caption whose tools are shown

    picture.begin = function() {
        const field = app.get("editor_caption");
        field.addEventListener("input", () => showCaption(field.value));
        field.addEventListener("change", () => editor.act(() => picture.keep()));
        app.get("editor_items").addEventListener("click", ({target, currentTarget}) => {
            const index = Array.from(currentTarget.children).indexOf(target.closest("button"));
            if (index >= 0) choose(names[index]);
        });
        editor.crop.begin();
        Object.assign(editor.actions, {
            "editor-left": () => turn(270),
            "editor-right": () => turn(90),
            "editor-crop": () => editor.crop.toggle(),
            "editor-whole": () => picture.change({clear_crop: true}),
            "editor-exclude": () => picture.change({excluded: !editor.row.excluded}),
        });
    };

    /** Take a picture in hand; place: its number in the list. */
    picture.hold = async function(row, place, total) {
        const other = !row || !editor.row || editor.row.file !== row.file;
        if (other) await picture.keep();
        app.setText(app.get("editor_place_of"), row ? app.t("{n} of {total}", {n: place, total}) : "");
        if (!other) return picture.follow(row);
        editor.crop.end();
        editor.row = row;
        chosen = null;
        if (!row) return;
        app.setText(app.get("editor_file"), row.file);
        app.get("editor_caption").value = row.caption;
        showCaption(row.caption);
        showRow();
        load();
        editor.tools.suggest();
    };

    /** The picture in hand changed on the server; what is being typed stays. */
    picture.follow = function(row) {
        const touched = picture.touched();
        const seen = editor.row.version;
        editor.row = row;
        if (!touched) {
            const field = app.get("editor_caption");
            if (field.value !== row.caption) {
                field.value = row.caption;
                showCaption(row.caption);
            }
        }
        showRow();
        if (seen !== row.version) load();
        else draw();
        editor.tools.suggest();
    };

    function showRow() {
        const {row} = editor;
        app.setText(app.get("editor_exclude"), app.t(row.excluded ? "Include again" : "Exclude"));
        app.get("editor_whole").disabled = !row.crop;
    }

    picture.touched = () => Boolean(editor.row) && app.get("editor_caption").value !== editor.row.caption;

    picture.edit = function() {
        const field = app.get("editor_caption");
        field.focus();
        field.setSelectionRange(field.value.length, field.value.length);
    };

    picture.putBack = () => editor.row && picture.type(editor.row.caption);

    /** Write this into the caption's field, as if it were being typed. */
    picture.type = function(text) {
        app.get("editor_caption").value = text;
        showCaption(text);
    };

    /** Send what was typed, as one step. */
    picture.keep = async function() {
        if (picture.touched()) {
            const {row, state: {id}} = editor; // the text belongs to this folder, whichever is open when it is sent
            const earlier = sending.get(address(id, row.file));
            const one = {text: app.get("editor_caption").value, stored: earlier ? earlier.stored : row.caption};
            sending.set(address(id, row.file), one);
            row.caption = one.text; // a second call meanwhile must not send it again
            // In the order in which they were typed.
            const mine = (keeping = picture.settled().then(() => send(id, row.file, one)).finally(() => {
                if (keeping === mine) keeping = null;
            }));
        }
        while (keeping) await keeping; // also those that are on their way: what follows shall find them there
    };
    let keeping = null;

    // Captions that are on their way, by session and file: the last text of each, and the caption that the server has.
    const sending = new Map();
    const address = (id, file) => `${id}/${file}`;

    /** A row as the server sent it, with the caption that is still on its way there: it is newer than the row's. */
    picture.ahead = function(row) {
        const one = sending.get(address(editor.state.id, row.file));
        if (!one) return row;
        one.stored = row.caption;
        return {...row, caption: one.text};
    };

    /** What is on its way has arrived, or is back in the field as not sent. */
    picture.settled = () => Promise.resolve(keeping).catch(() => null);

    async function send(id, file, one) {
        const arrived = () => sending.get(address(id, file)) === one && sending.delete(address(id, file));
        try {
            const {rows} = await editor.call("/captions", {captions: {[file]: one.text}}, id);
            arrived();
            editor.gallery.merge(rows);
        } catch (error) {
            const last = arrived();
            if (error === editor.OVERTAKEN) return; // it is sent, and its folder is not shown any more
            if (last && editor.isOpen(id) && editor.row && editor.row.file === file) {
                editor.row.caption = one.stored;
                editor.gallery.merge([editor.row]);
            }
            throw error;
        }
    }

    // -- the caption in colors

    /** A caption in parts, as app.setParts takes them: core and mood have their class. For the eye; the server parses. */
    editor.marked = function(text) {
        const parts = [];
        const pattern = /\\.|(\*{1,3})(?![\s*])((?:\\.|[^*,，、\n\\])+?)\1(?!\*)/g;
        let end = 0;
        for (const match of text.matchAll(pattern)) {
            if (!match[1]) continue;
            if (match.index > end) parts.push({text: text.slice(end, match.index)});
            parts.push({text: match[2], class: match[1].length === 1 ? "mood" : match[1].length === 2 ? "core" : "core mood"});
            end = match.index + match[0].length;
        }
        if (end < text.length) parts.push({text: text.slice(end)});
        return parts;
    };

    /** The items of a caption as they are written; brackets and escapes shield commas. */
    function items(text) {
        const found = [""];
        let depth = 0;
        for (let place = 0; place < text.length; place++) {
            const letter = text[place];
            if (letter === "\\") found[found.length - 1] += letter + (text[++place] || "");
            else if (!depth && /[,，、\n]/.test(letter)) found.push("");
            else {
                if ("([{".includes(letter)) depth++;
                if (")]}".includes(letter)) depth = Math.max(0, depth - 1);
                found[found.length - 1] += letter;
            }
        }
        return found.map((one) => one.trim()).filter(Boolean);
    }

    /** An item by the name that the server finds it by: without marks, weight and escapes. */
    const plain = (item) => item
        .replace(/^\((.*):\s*[\d.]+\)$/, "$1")
        .replace(/\\.|\*{1,3}/g, (found) => (found[0] === "\\" ? found[1] : "")).trim();

    function showCaption(text) {
        const shown = items(text);
        names = shown.map(plain);
        const chips = app.setCount(app.get("editor_items"), shown.length, () => app.el("button", {type: "button", class: "chip"}));
        chips.forEach((chip, index) => {
            app.setParts(chip, editor.marked(shown[index]));
            chip.setAttribute("aria-pressed", String(names[index] === chosen));
        });
        showTools();
        clearTimeout(previewing);
        previewing = setTimeout(() => preview(text).catch((error) => app.complain(error, app.get("editor_problem"))), PREVIEW_MS);
    }

    function choose(name) {
        chosen = chosen === name ? null : name;
        showCaption(app.get("editor_caption").value);
        const node = app.get("editor_items").querySelector("[aria-pressed=true]");
        if (node) node.focus();
    }

    function showTools() {
        const place = app.get("editor_item_tools");
        app.show(place, chosen !== null);
        if (chosen === null) return;
        const edit = (wish) => editor.act(async() => {
            await picture.keep();
            await editor.stepped(await editor.call("/edit", {tags: [chosen], files: [editor.row.file], ...wish}));
        });
        place.replaceChildren(
            app.button("Core", () => edit({kind: "mark", value: "core"})),
            app.button("Mood", () => edit({kind: "mark", value: "mood"})),
            app.button("Neither", () => edit({kind: "mark", value: "none"})),
            app.button("To the start", () => edit({kind: "move", place: "start"})),
            app.button("Remove", () => edit({kind: "remove"})),
            app.button("Filter by it", () => editor.gallery.want("tags", chosen)),
        );
    }

    async function preview(text) {
        const mine = ++asked;
        const seen = await app.post("/captions/preview", {caption: text, trigger_word: editor.state ? editor.state.trigger_word : ""});
        if (mine !== asked) return;
        const parts = [app.t(seen.tokens ? "{n} tokens" : "about {n} tokens", {n: seen.count})];
        if (seen.chunks > 1) parts.push(app.t("read in {n} parts of 75", {n: seen.chunks}));
        app.setText(app.get("editor_count"), parts.join(" · "));
        app.setParts(app.get("editor_tokens"), seen.tokens
            ? seen.tokens.map((text) => ({text, class: "token"}))
            : [{text: seen.train || app.t("nothing: the picture is learned without words")}]);
        app.setText(app.get("editor_warnings"), seen.warnings.join(" "));
        app.show(app.get("editor_warnings"), seen.warnings.length);
    }

    // -- the picture

    picture.change = (wish) => editor.act(async() => {
        editor.crop.end();
        if (!editor.row) return;
        await editor.stepped(await editor.call("/pictures/edit", {files: [editor.row.file], ...wish}));
    });

    // A crop belongs to the picture as it was turned.
    const turn = (degrees) => picture.change({rotate: (editor.row.rotate + degrees) % 360, clear_crop: true});

    function load() {
        const {row} = editor;
        const next = new Image();
        app.get("editor_canvas").setAttribute("aria-label", row.file);
        next.onload = () => {
            if (editor.row && editor.row.file === row.file) {
                image = {node: next, file: row.file, ready: false};
                draw();
            }
        };
        next.onerror = () => { // a format that the browser cannot show; the thumbnail is turned and cropped already
            const small = new Image();
            small.onload = () => {
                if (!editor.row || editor.row.file !== row.file) return;
                image = {node: small, file: row.file, ready: true};
                draw();
            };
            small.src = editor.gallery.url(row, "thumbnails");
        };
        next.src = editor.gallery.url(row, "pictures");
    }

    const draw = (picture.draw = function() {
        const {row} = editor;
        if (!row || !image || image.file !== row.file) return;
        const canvas = app.get("editor_canvas");
        const turned = image.ready ? 0 : row.rotate;
        const {naturalWidth, naturalHeight} = image.node;
        const longer = Math.max(naturalWidth, naturalHeight);
        const scale = Math.min(SIDES[1], Math.max(SIDES[0], longer)) / longer;
        const [width, height] = [naturalWidth * scale, naturalHeight * scale];
        const upright = turned % 180 === 0;
        canvas.width = Math.round(upright ? width : height);
        canvas.height = Math.round(upright ? height : width);
        const paper = canvas.getContext("2d");
        paper.translate(canvas.width / 2, canvas.height / 2);
        paper.rotate(turned * Math.PI / 180);
        paper.drawImage(image.node, -width / 2, -height / 2, width, height);
        paper.setTransform(1, 0, 0, 1, 0, 0);
        canvas.dataset.excluded = row.excluded;
        const kept = editor.crop.rectangle || (image.ready ? null : row.crop);
        if (!kept) return;
        const [left, top, right, bottom] = kept.map((share, side) => share * (side % 2 ? canvas.height : canvas.width));
        paper.beginPath();
        paper.rect(0, 0, canvas.width, canvas.height);
        paper.rect(left, top, right - left, bottom - top);
        paper.globalAlpha = 0.6;
        paper.fillStyle = "black";
        paper.fill("evenodd");
        paper.globalAlpha = 1;
        paper.strokeStyle = "white";
        paper.lineWidth = Math.max(1, canvas.width / 400);
        paper.strokeRect(left, top, right - left, bottom - top);
    });
})(loraTrainer);
