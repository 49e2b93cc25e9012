// Step 1: pictures dropped here, sent from the gallery, or named by a folder; thumbnails and what is refused.
(function(app) {
    "use strict";

    const SHOWN = 11; // and a tile that leads to more
    const MORE = 96;
    const BATCH_BYTES = 16 << 20;
    const BATCH_FILES = 16;
    const TEXT = /\.(txt|caption)$/i;
    const TABLE = /\.(csv|jsonl)$/i;

    // chosen: name of an uploaded dataset, or a folder of the server; what train_data_dir will be.
    // joined: how many were added to earlier ones, and which those are.
    const pictures = (app.pictures = {chosen: null, rows: [], refusedUploads: [], busy: null, joined: null});
    let uploads = Promise.resolve();
    let listing = null; // the newest question for the list of data sets
    let choices = 0;

    pictures.begin = function() {
        const files = app.get("files");
        files.addEventListener("change", () => {
            pictures.add(Array.from(files.files));
            files.value = "";
        });
        app.dropZone(app.get("drop"), (dropped) => droppedFiles(dropped).then(({files: found, folder}) => pictures.add(found, folder))
            .catch((error) => app.complain(error, app.get("problem_train_data_dir"))));
        app.get("earlier").addEventListener("change", (event) => event.target.value && pictures.choose(event.target.value));
        pictures.listEarlier();
    };

    /** Files of a drop, those of dropped folders too; folder: the name of the one that was dropped. */
    async function droppedFiles(transfer) {
        const entries = Array.from(transfer.items || [], (item) => item.webkitGetAsEntry && item.webkitGetAsEntry());
        const folders = entries.filter((entry) => entry && entry.isDirectory);
        if (!folders.length) return {files: Array.from(transfer.files)};
        const found = [];
        const walk = async(entry) => {
            if (entry.isFile) return void found.push(await new Promise((done, fail) => entry.file(done, fail)));
            const reader = entry.createReader();
            for (;;) { // a browser lists a folder in portions
                const some = await new Promise((done, fail) => reader.readEntries(done, fail));
                if (!some.length) return;
                for (const one of some) await walk(one);
            }
        };
        for (const entry of entries) if (entry) await walk(entry);
        return {files: found, folder: folders.length === 1 && entries.length === 1 ? folders[0].name : null};
    }

    pictures.listEarlier = function() {
        const mine = (listing = app.fetchJson("/datasets").then(({datasets}) => (mine === listing ? showEarlier(datasets) : listing)));
        return mine;
    };

    function showEarlier(datasets) {
        const list = app.get("earlier");
        list.replaceChildren(
            app.el("option", {value: ""}, app.t("choose …")),
            ...datasets.filter((one) => one.pictures).map((one) => app.el("option", {value: one.name}, `${one.name} (${one.pictures})`)),
        );
        pictures.library = new Set(datasets.map((one) => one.name));
        list.value = pictures.library.has(pictures.chosen) ? pictures.chosen : "";
        app.pair.listKnown(datasets);
        app.show(app.get("earlier_field"), list.options.length > 1);
        if (list.options.length > 1) app.show(app.get("other_pictures"), true);
    }

    /** Upload files with their captions, into the chosen dataset or a new one; more of them go where the first went.
     * folder: what a new one may be called. */
    pictures.add = function(files, folder) {
        if (!files.length) return null;
        const mine = (pictures.busy = uploads = uploads.then(() => upload(files, folder))
            .catch((error) => app.complain(error, app.get("problem_train_data_dir")))
            .finally(() => {
                app.show(app.get("upload"), false);
                if (pictures.busy === mine) pictures.busy = null;
            }));
        return mine;
    };

    async function upload(files, folder) {
        const captions = await readCaptions(files);
        const images = files.filter((file) => !TEXT.test(file.name) && !TABLE.test(file.name) && !file.name.startsWith("."));
        if (!images.length) return takeCaptions(captions);
        const dataset = await ownDataset(folder);
        const earlier = new Set(included().map((row) => row.file));
        pictures.refusedUploads = [];
        let batch = [];
        let bytes = 0;
        let done = 0;
        let added = 0;
        const status = app.get("upload");
        app.show(status, true);
        const send = async() => {
            const answer = await app.post(`/datasets/${encodeURIComponent(dataset)}/pictures`, {pictures: batch});
            answer.refused.forEach((one) => pictures.refusedUploads.push({file: one.field, reason: one.message, remedy: one.remedy}));
            if (answer.refused.length) app.get("refused").open = true;
            added += answer.added.length;
            done += batch.length;
            batch = [];
            bytes = 0;
        };
        try {
            for (const file of images) {
                app.setText(status, app.t("Uploading {done} of {total} …", {done: done + batch.length, total: images.length}));
                const large = app.tooLarge(file);
                if (large) {
                    pictures.refusedUploads.push({file: file.name, reason: large.message, remedy: large.remedy});
                    app.get("refused").open = true;
                    continue;
                }
                if (bytes + file.size > BATCH_BYTES && batch.length) await send();
                const caption = file.caption || captionOf(file.name, captions);
                batch.push({name: file.name, data: await app.dataUrl(file), caption});
                bytes += file.size;
                if (batch.length >= BATCH_FILES) await send();
            }
            if (batch.length) await send();
        } catch (error) {
            // What has arrived stays, and the rest can follow it.
            if (added) await pictures.listEarlier().then(() => pictures.choose(dataset)).catch(() => null);
            throw error;
        }
        if (!added && images.length && dataset !== pictures.chosen) {
            showRefused([]);
            throw new app.ServerError(0, {message: app.t("None of these files can be used."), remedy: app.t("The reasons stand below.")});
        }
        await pictures.listEarlier();
        pictures.joined = dataset === pictures.chosen && earlier.size ? {added, earlier} : null;
        await pictures.choose(dataset);
    }

    /** Captions that come after their pictures. Those that a picture has already stay. */
    async function takeCaptions(captions) {
        const wanted = {};
        for (const {file, caption} of pictures.rows) {
            const text = captionOf(file.split("/").pop(), captions);
            if (text && !caption.trim()) wanted[file] = text;
        }
        if (!Object.keys(wanted).length) {
            throw new app.ServerError(0, {message: app.t("None of these files can be used."), remedy: app.t("Captions go by the file names of pictures that are here and have none yet.")});
        }
        await app.post(`/datasets/${encodeURIComponent(pictures.chosen)}/captions`, {captions: wanted});
        await pictures.choose(pictures.chosen);
    }

    async function ownDataset(folder) {
        if (!pictures.library) await pictures.listEarlier();
        if (pictures.chosen && pictures.library.has(pictures.chosen)) return pictures.chosen;
        const now = new Date(Date.now() - new Date().getTimezoneOffset() * 60000).toISOString();
        const usual = "pictures " + now.slice(0, 19).replace("T", " ").replace(/:/g, ".");
        const name = folder && !pictures.library.has(folder) ? folder : usual;
        const {name: made} = await app.post("/datasets", {name})
            .catch((error) => (name === usual ? Promise.reject(error) : app.post("/datasets", {name: usual}))); // it can be no name
        return made;
    }

    const stem = (name) => name.replace(/\.[^.]*$/, "");
    const captionOf = (name, captions) => captions[name] || captions[stem(name)] || "";

    /** Captions that came along: by the picture's file name (tables), or by its stem (text files). */
    async function readCaptions(files) {
        const captions = {};
        for (const file of files) {
            if (TEXT.test(file.name)) captions[stem(file.name)] = (await file.text()).trim();
            if (!TABLE.test(file.name)) continue;
            const text = (await file.text()).replace(/^\uFEFF/, "");
            for (const row of /\.csv$/i.test(file.name) ? csvRows(text) : jsonRows(text)) {
                const name = row.filename || row.file_name || row.file || row.image;
                const caption = row.prompt || row.caption || row.text;
                if (name && caption) captions[name.split(/[\\/]/).pop()] = caption;
            }
        }
        return captions;
    }

    function csvRows(text) {
        const cells = text.match(/("(?:[^"]|"")*"|[^,\r\n]*)(,|\r?\n|$)/g) || [];
        const rows = [[]];
        for (const cell of cells) {
            const value = cell.replace(/(,|\r?\n)$/, "");
            rows[rows.length - 1].push(value.startsWith('"') ? value.slice(1, -1).replace(/""/g, '"') : value.trim());
            if (/\n$/.test(cell)) rows.push([]);
        }
        const names = (rows.shift() || []).map((name) => name.toLowerCase());
        return rows.map((row) => Object.fromEntries(names.map((name, index) => [name, row[index] || ""])));
    }

    const jsonRows = (text) => text.split("\n").flatMap((line) => {
        try {
            return line.trim() ? [JSON.parse(line)] : [];
        } catch (error) {
            return []; // a line that is no JSON is no caption; the count of captions shows what is missing
        }
    });

    /** Take an uploaded dataset by name, or a folder of the server. */
    pictures.choose = async function(folder) {
        const mine = ++choices;
        if (pictures.chosen !== (folder || null)) pictures.joined = null;
        pictures.chosen = folder || null;
        pictures.rows = [];
        app.form.picturesChosen(pictures.chosen);
        app.form.problem("train_data_dir", null);
        const known = pictures.library && (!folder || pictures.library.has(folder) || /[\\/]/.test(folder));
        if (!known) await pictures.listEarlier(); // it may have been made on another page
        if (mine !== choices) return null; // others were chosen meanwhile
        const uploaded = folder && pictures.library.has(folder);
        if (uploaded) {
            const {pictures: rows} = await app.fetchJson("/datasets/" + encodeURIComponent(folder));
            if (mine !== choices) return null;
            pictures.rows = rows;
        }
        app.get("earlier").value = uploaded ? folder : "";
        app.get("folder") && (app.get("folder").value = folder && !uploaded ? folder : "");
        if (folder && !uploaded) app.get("other_pictures").open = true;
        showThumbnails();
        app.show(app.get("picture_links"), pictures.rows.length);
        app.show(app.get("pictures"), false);
        app.show(app.get("hints"), false);
        showRefused([]);
        app.form.store();
        return app.estimate.now();
    };

    pictures.allOut = () => pictures.rows.length > 0 && !included().length;

    const included = () => pictures.rows.filter((row) => !row.excluded);

    function showThumbnails(limit = SHOWN) {
        const box = app.get("thumbnails");
        const rows = included();
        app.show(box, rows.length);
        const left = rows.length > limit + 1 ? rows.length - limit : 0; // a tile for one more is that one
        box.replaceChildren(...rows.slice(0, rows.length - left).map((row) => thumbnail(row, limit)));
        if (left) {
            box.append(app.el("button", {
                type: "button", class: "more_pictures", title: app.t("Show more"), onclick: () => showThumbnails(limit + MORE),
            }, "+" + left));
        }
    }

    function thumbnail(row, limit) {
        const name = row.caption || row.file;
        return app.el("span", {class: "small_picture"},
            app.el("img", {src: app.thumbnailUrl(pictures.chosen, row.file), alt: name, title: name, loading: "lazy"}),
            app.el("button", {
                type: "button", class: "take_out", title: app.t("Exclude this picture; your file stays."),
                "aria-label": app.t("Exclude {name}", {name: row.file}),
                onclick: () => exclude([row], true, limit).catch((error) => app.complain(error, app.get("problem_train_data_dir"))),
            }, "×"));
    }

    /** Leave pictures out of the training, or take them in again. */
    async function exclude(rows, excluded, limit) {
        await app.post(`/datasets/${encodeURIComponent(pictures.chosen)}/exclude`, {files: rows.map((row) => row.file), excluded});
        rows.forEach((row) => (row.excluded = excluded));
        showThumbnails(limit);
        return app.estimate.now();
    }

    pictures.firstCaption = function() {
        const row = included().find((one) => one.caption.trim());
        return row ? row.caption.replace(/\*+/g, "").trim() : "";
    };

    pictures.captioned = () => included().filter((row) => row.caption.trim()).length;

    /** What is chosen, and the ways out of it. facts: what the server said of the pictures; null where it said nothing,
     * because something else is wrong, such as a base model that cannot be trained. */
    function showSummary(facts) {
        const captions = pictures.captioned();
        const rows = included().length;
        const parts = facts
            ? [app.t(facts.pictures === 1 ? "1 picture is fine" : "{n} pictures are fine", {n: facts.pictures})]
            : [pictures.rows.length ? app.t(rows === 1 ? "1 picture" : "{n} pictures", {n: rows}) : pictures.chosen];
        if (captions && (!facts || facts.pictures)) parts.push(app.t("{n} with a caption", {n: captions}));
        else if (facts && facts.pictures && pictures.rows.length) parts.push(app.t(facts.problems.length ? "no captions yet" : facts.captioner ? "a captioner describes them first" : "no captions: the trigger word stands for all"));
        const out = pictures.rows.filter((row) => row.excluded);
        if (out.length) parts.push(app.t("{n} excluded", {n: out.length}));
        const own = pictures.library && pictures.library.has(pictures.chosen);
        const line = app.get("pictures");
        line.replaceChildren(own ? app.el("b", {}, pictures.chosen) : "", (own ? " · " : "") + parts.join(" · ") + " ",
            out.length ? app.button("Include them again", () => exclude(out, false).catch(app.complain), "link") : "", " ",
            app.button("Take others", () => pictures.choose(null), "link"), ...joining());
        app.show(line, pictures.chosen);
        app.show(app.get("picture_links"), pictures.rows.length || facts);
    }

    /** Pictures that were added to others say so: perhaps a new beginning was meant. */
    function joining() {
        const {added, earlier} = pictures.joined || {};
        const before = included().filter((row) => earlier && earlier.has(row.file));
        if (!before.length) return [];
        return [app.el("br"), app.t("{n} new, added to {before} that were here.", {n: added, before: before.length}), " ",
            app.button("Exclude the earlier ones", () => exclude(before, true), "link")];
    }

    pictures.notJudged = () => showSummary(null);

    /** What the server said of the pictures. */
    pictures.judged = function(facts) {
        showSummary(facts);
        const known = new Set(pictures.rows.filter((row) => row.excluded).map((row) => row.file));
        showRefused(facts.refused.filter(({file}) => !known.has(file.split(/[\\/]/).pop())));
        app.hints("hints", facts.warnings);
    };

    function showRefused(refused) {
        const all = [...pictures.refusedUploads, ...refused];
        const box = app.get("refused");
        app.setText(box.querySelector("summary"), app.t(all.length === 1 ? "1 file is left out" : "{n} files are left out", {n: all.length}));
        box.querySelector("ul").replaceChildren(
            ...all.map(({file, reason, remedy}) => {
                const name = file.split(/[\\/]/).pop();
                const text = app.sentence({message: reason, remedy});
                const known = [file, name].find((one) => text.startsWith(one)) || "";
                return app.el("li", {}, app.el("b", {}, name), " " + text.slice(known.length).trim());
            }),
        );
        app.show(box, all.length);
    }
})(loraTrainer);
