// The Dataset sub-tab's tools: captioning, the checks with their fixes, export and backups.
(function(app) {
    "use strict";

    const FINDINGS = 100;
    const STATES = {error: "error", warning: "warning", info: "note"};
    const PANELS = ["tags", "many", "caption", "check", "export"];
    const editor = app.editor;
    const tools = (editor.tools = {captioners: null, report: null});

    tools.begin = function() {
        editor.tags.begin();
        app.get("editor_captioner").addEventListener("change", showCaptioner);
        Object.assign(editor.actions, {
            "editor-panel": (button) => tools.panel(button.dataset.panel),
            "editor-caption": () => afterSaving(caption),
            "editor-check": () => afterSaving(check),
            "editor-fix-all": () => editor.act(() => fix({all_safe: true})),
            "editor-export": () => afterSaving(exportCaptions),
        });
    };

    /** Open one of the tools, or close it where it is open; open: true leaves it open. */
    tools.panel = function(name, open) {
        const on = open || app.get("editor_panel_" + name).hidden;
        for (const one of PANELS) {
            const shown = one === name && on;
            app.show(app.get("editor_panel_" + one), shown);
            app.get("editor_opens_" + one).setAttribute("aria-expanded", String(shown));
        }
        if (!on) return null;
        if (name === "caption") return editor.act(loadCaptioners);
        if (name === "check" && !tools.report) return editor.act(loadReport);
        if (name === "export") return editor.act(loadBackups);
        return null;
    };

    tools.suggest = () => editor.suggest();
    tools.changed = () => editor.tags.changed();

    /** Another folder is open. */
    tools.opened = async function() {
        tools.report = null;
        app.get("editor_findings").replaceChildren();
        app.setText(app.get("editor_verdict"), "");
        fillKinds([]);
        if (editor.state.has_report) await loadReport();
    };

    tools.finished = async function(task) {
        if (task.error) {
            app.complain({problems: [task.error]}, app.get("editor_problem"));
            return;
        }
        if (task.kind === "check") {
            if (task.status === "finished") await loadReport();
            return;
        }
        const {written = 0, kept = 0, skipped = []} = task.result;
        const parts = [app.t(written === 1 ? "1 caption written." : "{n} captions written.", {n: written})];
        if (kept) parts.push(app.t("{n} stayed as they were.", {n: kept}));
        if (task.status === "cancelled") parts.push(app.t("The rest was cancelled."));
        skipped.slice(0, 5).forEach((one) => parts.push(`${one.file}: ${one.reason}`));
        editor.say([...parts, ...task.warnings].join(" "));
        if (app.pictures.chosen === editor.folder) await app.pictures.choose(editor.folder);
    };

    /** Checks, captioners and exports work on the files: save first, with the person's consent. */
    function afterSaving(action) {
        return editor.act(async() => {
            await editor.picture.keep();
            if (!editor.state.unsaved) return action();
            editor.say(app.t(editor.state.unsaved === 1 ? "1 change is not saved." : "{n} changes are not saved.", {n: editor.state.unsaved}),
                app.button("Save and go on", () => editor.save().then(() => editor.state.unsaved || editor.act(action)), "primary"));
            return null;
        });
    }

    // -- captioning

    async function loadCaptioners() {
        if (!app.get("editor_trigger").value) app.get("editor_trigger").value = editor.state.trigger_word;
        const found = (tools.captioners = await app.fetchJson("/captioners"));
        const list = app.get("editor_captioner");
        const before = list.value;
        list.replaceChildren(...found.captioners.map((one) =>
            app.el("option", {value: one.name}, one.problem ? app.t("{name} (not here yet)", {name: app.t(one.title)}) : app.t(one.title))));
        const usable = found.captioners.find((one) => !one.problem);
        list.value = before || (usable || found.captioners[0]).name;
        const kinds = app.get("editor_caption_kind");
        if (!kinds.options.length) {
            kinds.replaceChildren(app.el("option", {value: ""}, app.t("leave nothing out")),
                ...found.kinds.map((one) => app.el("option", {value: one.kind, title: app.t(one.hint)}, app.t(one.title))));
            kinds.value = found.kinds.some((one) => one.kind === app.form.kind()) ? app.form.kind() : "";
        }
        showCaptioner();
    }

    function showCaptioner() {
        const chosen = tools.captioners.captioners.find((one) => one.name === app.get("editor_captioner").value);
        const place = app.get("editor_captioner_problem");
        app.setText(place, chosen && chosen.problem ? app.sentence({message: chosen.problem, remedy: chosen.remedy}) : "");
        app.show(place, chosen && chosen.problem);
        app.get("editor_caption_go").disabled = !chosen || Boolean(chosen.problem);
    }

    async function caption() {
        const whole = !editor.gallery.selected.size && editor.gallery.total === editor.state.pictures;
        const trigger = app.get("editor_trigger").value.trim();
        editor.say("");
        if (trigger && !app.form.given.trigger_word) app.form.set("trigger_word", trigger); // the training's, too
        await editor.call("/caption", {
            captioner: app.get("editor_captioner").value,
            mode: app.get("editor_mode").value,
            kind: app.get("editor_caption_kind").value,
            trigger_word: trigger,
            template: app.get("editor_template").value,
            files: whole ? null : await editor.gallery.scopeFiles(),
        });
    }

    // -- checks

    async function check() {
        editor.say("");
        const wanted = String(app.form.value("resolution"));
        const resolution = /^\d/.test(wanted) ? wanted : app.estimate.resolution || "512"; // "auto" follows the base model
        await editor.call("/check", {resolution, trigger_word: app.form.value("trigger_word") || ""});
    }

    async function loadReport() {
        if (!editor.state.has_report) return;
        const {id} = editor.state;
        const report = await app.fetchJson(`/editor/${id}/report`);
        if (!editor.isOpen(id)) return;
        tools.report = report;
        const count = (severity) => report.findings.filter((one) => one.severity === severity).length;
        const verdict = report.stops_training ? app.t("A training would not start.")
            : count("error") ? app.t("A training can start, but leaves out or learns badly what the errors name.") : app.t("A training can start.");
        app.setText(app.get("editor_verdict"), report.findings.length
            ? verdict + " " + app.t("Errors: {errors}, warnings: {warnings}, notes: {notes}.", {errors: count("error"), warnings: count("warning"), notes: count("info")})
            : verdict + " " + app.t("Nothing was found."));
        const left = report.findings.length - FINDINGS;
        app.get("editor_findings").replaceChildren(...report.findings.slice(0, FINDINGS).map(line),
            ...(left > 0 ? [app.el("li", {}, app.t("and {n} more", {n: left}))] : []));
        app.show(app.get("editor_fix_all"), report.findings.some((one) => one.fixes.some((fixed) => fixed.safe)));
        fillKinds(Array.from(new Set(report.findings.map((one) => one.kind))));
        showBuckets(report);
    }

    function fillKinds(kinds) {
        const list = app.get("editor_kind");
        const before = list.value;
        list.replaceChildren(app.el("option", {value: ""}, app.t("With or without problems")),
            app.el("option", {value: "any"}, app.t("With a problem")),
            ...kinds.sort().map((kind) => app.el("option", {value: kind}, app.t(kind))));
        list.value = before;
        if (list.selectedIndex < 0) list.value = "";
        app.show(list, kinds.length);
    }

    function line(finding) {
        const files = finding.files.length ? finding.files : [finding.file].filter(Boolean);
        const pictures = files.slice(0, 4).map((file) => app.el("button", {
            type: "button", class: "finding_picture", title: file, "aria-label": app.t("Show {file}", {file}),
            onclick: () => editor.act(() => editor.gallery.show(file)),
        }, app.el("img", {src: editor.gallery.url({file, version: editor.state.revision}, "thumbnails"), alt: "", loading: "lazy", onerror: (event) => event.target.remove()})));
        const severity = app.el("span", {class: "state"}, app.t(STATES[finding.severity]));
        severity.dataset.status = finding.severity === "error" ? "failed" : "";
        return app.el("li", {class: "finding"},
            app.el("span", {class: "finding_pictures"}, ...pictures),
            app.el("div", {}, severity, " ", app.el("b", {}, finding.file), " ", app.said(finding.message), " ",
                app.el("span", {class: "help"}, app.said(finding.remedy))),
            app.el("span", {class: "row"}, ...finding.fixes.map((fixed) => app.el("button", {
                type: "button", class: "button secondary",
                onclick: (event) => editor.act(() => fix({index: finding.index, name: fixed.name}, event.target)),
            }, app.said(fixed.label)))));
    }

    async function fix(wish, button) {
        await editor.picture.keep();
        const answer = await editor.call("/fix", wish);
        await editor.stepped(answer);
        if (button) button.disabled = true;
        const text = answer.changed
            ? app.t(answer.changed === 1 ? "1 picture put right; save to keep it." : "{n} pictures put right; save to keep it.", {n: answer.changed})
            : app.t("There was nothing left to put right.");
        editor.say(text, ...(answer.changed ? [app.button("Undo", () => editor.undo("undo"))] : []));
    }

    function showBuckets(report) {
        const rows = report.buckets.map((row) => app.el("tr", {},
            ...[row.resolution.join(" × "), row.images, row.count, row.batches].map((cell) => app.el("td", {}, String(cell)))));
        app.get("editor_buckets").replaceChildren(app.el("table", {class: "table"},
            app.el("thead", {}, app.el("tr", {}, ...[app.t("Size"), app.t("Pictures"), app.t("Seen in an epoch"), app.t("Batches")]
                .map((text) => app.el("th", {scope: "col"}, text)))),
            app.el("tbody", {}, ...rows)));
        app.show(app.get("editor_sizes"), rows.length);
    }

    // -- export and backups

    async function exportCaptions() {
        const done = await editor.call("/export", {format: app.get("editor_format").value});
        editor.say([app.t(done.files === 1 ? "1 file written." : "{n} files written.", {n: done.files}), done.note].filter(Boolean).join(" "));
        await loadBackups();
    }

    async function loadBackups() {
        const {id} = editor.state;
        const {backups} = await app.fetchJson(`/editor/${id}/backups`);
        if (!editor.isOpen(id)) return;
        app.get("editor_backups").replaceChildren(
            ...(backups.length ? [] : [app.el("li", {class: "help"}, app.t("None yet: each save that replaces something makes one."))]),
            ...backups.slice(0, 20).map((one) => app.el("li", {},
                app.el("span", {}, app.t("Backup {n}", {n: one.number}) + " · " + app.date(one.time)),
                app.button("Go back to it", () => afterSaving(async() => {
                    await editor.call("/restore", {number: one.number});
                    await editor.gallery.reload();
                    await loadBackups();
                    editor.say(app.t("The captions are those of backup {n}.", {n: one.number}));
                })))));
    }
})(loraTrainer);
