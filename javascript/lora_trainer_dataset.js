// The Dataset sub-tab: one open folder, what is unsaved in it, its background task, its keys.
// The server holds the captions as they are edited; this page shows them and sends each change as one step.
(function(app) {
    "use strict";

    const LOOK_MS = 600;
    const REFRESH_MS = 5000;
    const GONE = 404;

    // folder: as it was opened. state: what the server said last. row: the picture in hand.
    const editor = (app.editor = {folder: null, state: null, row: null});
    let looking = null;
    let refreshed = 0;

    /** Thrown by editor.call: what was asked for is done, but its folder is not open any more. */
    editor.OVERTAKEN = new Error("another folder was opened");

    /** Is this session of the server the open folder's? */
    editor.isOpen = (id) => Boolean(editor.state) && editor.state.id === id;

    /** A call about the open folder, or about the session that is named; its answer's state is shown. */
    editor.call = async function(path, body, id = editor.state.id) {
        const answer = await app.post(`/editor/${id}${path}`, body);
        if (!editor.isOpen(id)) throw editor.OVERTAKEN; // nothing of the answer is to be shown
        editor.heard(answer.state || (answer.id && answer));
        return answer;
    };

    /** Something a person asked for: what goes wrong is said above the pictures. */
    editor.act = function(action) {
        app.show(app.get("editor_problem"), false);
        return Promise.resolve().then(action).catch((error) => (error.status === GONE && editor.state ? openAgain() : Promise.reject(error)))
            .catch((error) => (error === editor.OVERTAKEN ? null : app.complain(error, app.get("editor_problem"))));
    };

    /** The server was started anew and does not know the folder any more. What is being typed is still here. */
    const openAgain = () => (reopening = reopening || reopen().finally(() => (reopening = null)));
    let reopening = null;

    async function reopen() {
        const {folder, state: {id}} = editor;
        await editor.picture.settled();
        if (!editor.isOpen(id)) return; // another folder was opened meanwhile
        const {unsaved} = editor.state;
        const typed = editor.picture.touched() && {file: editor.row.file, text: app.get("editor_caption").value};
        try {
            await load(folder);
        } catch (error) {
            if (editor.folder !== folder) return;
            editor.state = editor.row = null;
            app.show(app.get("editor"), false);
            app.show(app.get("editor_open"), true);
            throw error;
        }
        if (editor.folder !== folder) return;
        if (typed) {
            await editor.gallery.show(typed.file);
            if (editor.folder !== folder) return;
            editor.picture.type(typed.text);
        }
        if (unsaved) editor.say(app.t(unsaved === 1 ? "The WebUI was started anew; 1 change that was not saved is gone." : "The WebUI was started anew; {n} changes that were not saved are gone.", {n: unsaved}));
    }

    editor.begin = function() {
        const folder = app.get("editor_folder");
        if (folder) folder.addEventListener("keydown", (event) => event.key === "Enter" && editor.actions["editor-folder"]());
        editor.keys.begin();
        window.addEventListener("beforeunload", (event) => {
            if (!editor.state || !(editor.state.unsaved || editor.picture.touched())) return;
            event.preventDefault();
            event.returnValue = ""; // what browsers ask for before they warn
        });
        window.addEventListener("focus", lookOutside);
        new IntersectionObserver((entries) => entries.some((entry) => entry.isIntersecting) && shown())
            .observe(app.get("editor_open").parentElement);
        editor.gallery.begin();
        editor.picture.begin();
        editor.tools.begin();
    };

    /** The sub-tab came into view: open the pictures of step 1, or offer what there is. */
    async function shown() {
        if (editor.state) return void lookOutside();
        await editor.act(async() => {
            await app.sets.load(true);
            if (app.pictures.chosen && !editor.other && !editor.state && !opening) await editor.open(app.pictures.chosen);
        });
    }

    /** Open a dataset or folder; panel: what to show at once. */
    editor.open = function(folder, panel) {
        return editor.act(async() => {
            app.openSubTab("Dataset");
            if (!folder) return;
            if (opening && opening.folder === folder) await opening.done;
            else if (editor.folder !== folder || !editor.state) await load(folder);
            else opening = null; // it is open: another one that is on its way is not wanted any more
            if (panel && editor.folder === folder) editor.tools.panel(panel, true);
        });
    };

    /** Open a folder; of several that are asked for, the last one. */
    function load(folder) {
        const mine = (opening = {folder});
        mine.done = fetchFolder(folder, () => mine === opening).finally(() => {
            if (opening === mine) opening = null;
        });
        return mine.done;
    }
    let opening = null;

    async function fetchFolder(folder, isLast) {
        const state = await app.post("/editor", {folder, trigger_word: app.form.value("trigger_word") || ""});
        if (editor.folder !== folder) await editor.picture.keep(); // what was typed belongs to the folder that is left
        if (!isLast()) return;
        editor.folder = folder;
        editor.row = null;
        editor.gallery.forget();
        editor.heard(state);
        await editor.gallery.load(0);
        await editor.tools.opened();
    }

    /** The server told how the folder stands. */
    editor.heard = function(state) {
        if (!state) return;
        const before = editor.state;
        editor.state = state;
        app.show(app.get("editor_open"), false);
        app.show(app.get("editor"), true);
        app.setText(app.get("editor_name"), state.name);
        const parts = [app.t(state.pictures === 1 ? "1 picture" : "{n} pictures", {n: state.pictures}),
            app.t("{n} with a caption", {n: state.captioned})];
        if (state.excluded) parts.push(app.t("{n} excluded", {n: state.excluded}));
        parts.push(state.unsaved ? app.t("{n} not saved", {n: state.unsaved}) : app.t("all saved"));
        app.setText(app.get("editor_counts"), parts.join(" · "));
        // A training reads the files: step 1 says so, too.
        app.setText(app.get("unsaved"), state.unsaved ? app.t(state.unsaved === 1 ? "1 change is not saved." : "{n} changes are not saved.", {n: state.unsaved}) : "");
        const running = Boolean(state.task && state.task.status === "running");
        app.get("editor_save").disabled = !state.unsaved;
        app.get("editor_discard").disabled = !state.unsaved;
        for (const [name, label] of [["undo", state.undo], ["redo", state.redo]]) {
            app.get("editor_" + name).disabled = label === null || label === undefined;
            app.get("editor_" + name).title = label || "";
        }
        showTask(state.task, running);
        if (running && !looking) looking = setTimeout(look, LOOK_MS);
        if (!before || before.id !== state.id || before.revision !== state.revision) editor.tools.changed();
    };

    function showTask(task, running) {
        app.show(app.get("editor_task"), running);
        if (!running) return;
        const share = task.total ? Math.round(100 * task.done / task.total) : 0;
        const text = task.kind === "caption" ? app.t("Describing the pictures") : app.t("Checking the pictures");
        app.setText(app.get("editor_task_text"), text + " …");
        app.setText(app.get("editor_task_count"), task.total ? `${task.done} / ${task.total}` : "");
        app.get("editor_bar_fill").style.width = share + "%";
        app.get("editor_bar").setAttribute("aria-valuenow", share);
    }

    async function look() {
        looking = null;
        if (!editor.state) return;
        await editor.act(async() => {
            const {id} = editor.state;
            const state = await app.fetchJson("/editor/" + id).catch((error) => {
                if (error.status !== GONE) looking = setTimeout(look, REFRESH_MS); // the task goes on meanwhile
                throw error;
            });
            if (!editor.isOpen(id)) return;
            editor.heard(state);
            if (!state.task || state.task.status === "running") return;
            await editor.gallery.reload();
            await editor.tools.finished(state.task);
        });
    }

    /** Somebody else may have changed the files while this page was not looked at. */
    async function lookOutside() {
        const now = Date.now();
        if (!editor.state || !editor.visible() || now - refreshed < REFRESH_MS) return;
        if (editor.state.task && editor.state.task.status === "running") return;
        refreshed = now;
        await editor.act(async() => {
            const {revision} = editor.state;
            const answer = await editor.call("/refresh");
            showConflicts(answer.conflicts);
            if (answer.state.revision !== revision) await editor.gallery.reload();
        });
    }

    editor.visible = () => Boolean(app.get("editor").offsetParent);

    /** A short sentence about what was done; nodes may follow it. */
    editor.say = function(text, ...nodes) {
        const place = app.get("editor_message");
        place.replaceChildren(text, ...nodes.flatMap((node) => [" ", node]));
        app.show(place, Boolean(text));
    };

    /** A step was made: show its pictures and say what it was. */
    editor.stepped = async function(answer, text) {
        const known = new Set(editor.gallery.rows.map((row) => row.file));
        editor.gallery.merge(answer.rows);
        if (answer.changed > answer.rows.length || answer.rows.some((row) => !known.has(row.file))) await editor.gallery.reload();
        if (text) editor.say(text);
    };

    /** Keys may be faster than the server: each of these begins when the one before has ended. */
    const inTurn = (action) => editor.act(() => (turn = turn.catch(() => null).then(action)));
    let turn = Promise.resolve();

    editor.undo = (which) => inTurn(async() => {
        await editor.picture.keep();
        const label = editor.state[which];
        if (label === null || label === undefined) return;
        const answer = await editor.call("/" + which);
        await editor.stepped(answer, which === "undo"
            ? app.t("Undone: {step} ({n})", {step: label, n: answer.changed})
            : app.t("Done again: {step} ({n})", {step: label, n: answer.changed}));
        if (editor.isOpen(answer.state.id) && answer.rows.length && answer.rows.length < 3) editor.gallery.show(answer.rows[0].file);
    });

    editor.save = (force) => inTurn(async() => {
        await editor.picture.keep();
        if (!editor.state.unsaved) return;
        const answer = await editor.call("/save", {force: Boolean(force)});
        showConflicts(answer.conflicts);
        if (!answer.saved) return;
        await editor.gallery.reload();
        editor.say(app.t(answer.files === 1 ? "1 file saved." : "{n} files saved.", {n: answer.files}) + (answer.backup ? " " + app.t("What was there before is backup {n}.", {n: answer.backup}) : ""));
        if (app.pictures.chosen === editor.folder) await app.pictures.choose(editor.folder);
    });

    function showConflicts(conflicts) {
        const place = app.get("editor_conflicts");
        app.show(place, conflicts.length);
        if (!conflicts.length) return place.replaceChildren();
        const take = (files) => editor.act(async() => {
            await editor.stepped(await editor.call("/theirs", {files}));
            showConflicts(conflicts.filter((one) => !files.includes(one.file)));
        });
        place.replaceChildren(
            app.el("p", {}, app.t("Somebody else changed these captions meanwhile. Nothing is written yet.")),
            app.el("ul", {class: "findings"}, ...conflicts.slice(0, 50).map((one) => app.el("li", {},
                app.el("div", {}, app.el("b", {}, one.file),
                    app.el("p", {}, app.t("Mine:") + " " + one.yours), app.el("p", {}, app.t("Theirs:") + " " + one.theirs)),
                app.button("Take theirs", () => take([one.file]))))),
            app.el("div", {class: "row"},
                app.button("Keep mine, all", () => editor.save(true), "primary"),
                app.button("Take theirs, all", () => take(conflicts.map((one) => one.file)))),
        );
    }

    function discard() {
        editor.say(app.t("This forgets {n} changes that are not saved.", {n: editor.state.unsaved}),
            app.button("Discard them", () => editor.act(async() => {
                editor.picture.putBack();
                await editor.call("/discard");
                showConflicts([]);
                editor.say("");
                await editor.gallery.reload();
            }), "danger"),
            app.button("Keep them", () => editor.say("")));
    }

    /** Back to the choice; what is unsaved stays with the server and is there when the folder is opened again. */
    async function leave() {
        await editor.picture.keep();
        if (editor.state && editor.state.unsaved) {
            return editor.say(app.t(editor.state.unsaved === 1 ? "1 change is not saved." : "{n} changes are not saved.", {n: editor.state.unsaved}),
                app.button("Save them", () => editor.save().then(() => editor.state.unsaved || leave()), "primary"),
                app.button("Keep working", () => editor.say("")));
        }
        editor.state = editor.folder = editor.row = null;
        editor.other = true;
        editor.say("");
        app.show(app.get("editor"), false);
        app.show(app.get("editor_open"), true);
        return shown();
    }

    async function train() {
        await editor.save();
        if (editor.state.unsaved) return;
        const {folder} = editor;
        app.openSubTab("Train");
        await app.pictures.choose(folder);
    }

    editor.actions = {
        "caption-chosen": () => editor.open(app.pictures.chosen, "caption"),
        "edit-chosen": () => editor.open(app.pictures.chosen),
        "editor-folder": () => editor.open(app.get("editor_folder").value.trim()),
        "editor-save": () => editor.save(),
        "editor-undo": () => editor.undo("undo"),
        "editor-redo": () => editor.undo("redo"),
        "editor-discard": discard,
        "editor-other": leave,
        "editor-train": train,
        "editor-cancel": () => editor.act(() => editor.call("/cancel")),
    };
})(loraTrainer);
