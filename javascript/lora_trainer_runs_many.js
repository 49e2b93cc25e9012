// Several runs at once: what differs between the settings of two, and deleting those that are ticked.
(function(app) {
    "use strict";

    const {runs} = app;
    const many = (runs.many = {});

    /** The tick box in a run's line. */
    many.tick = function(job) {
        const box = app.el("input", {type: "checkbox", "aria-label": app.t("Select {file}", {file: job.name}), disabled: job.active});
        box.checked = runs.selected.has(job.id);
        box.addEventListener("change", () => {
            if (box.checked) runs.selected.add(job.id);
            else runs.selected.delete(job.id);
            many.show();
        });
        return box;
    };

    /** What can be done with the runs that are ticked, of those that are shown. */
    many.show = function() {
        const shown = new Set(runs.jobs.filter((job) => !job.active).map((job) => job.id));
        runs.selected.forEach((id) => shown.has(id) || runs.selected.delete(id));
        const count = runs.selected.size;
        const bar = app.get("runs_many");
        app.show(bar, count);
        if (!count) return;
        bar.replaceChildren(
            app.el("span", {class: "status"}, app.t(count === 1 ? "1 selected" : "{n} selected", {n: count})),
            count < shown.size ? app.button("Select all", () => select(shown)) : "",
            app.button("Select none", () => select([])),
            app.button("Delete …", ask));
    };

    function select(ids) {
        runs.selected = new Set(ids);
        runs.jobs.forEach((job) => {
            const line = app.get("run_" + job.id);
            if (line) line.querySelector("input").checked = runs.selected.has(job.id);
        });
        many.show();
    }

    /** Two clicks: the second is asked for, with what it takes away. */
    function ask() {
        const ids = [...runs.selected];
        const message = app.get("runs_message");
        const question = ids.length === 1 ? "This deletes the run's settings, states, previews and logs. The published LoRA and your pictures stay."
            : app.t("This deletes {n} runs with their settings, states, previews and logs. Published LoRAs and your pictures stay.", {n: ids.length});
        message.replaceChildren(ids.length === 1 ? app.t(question) : question, " ",
            app.button("Delete them", () => remove(ids), "danger"), " ",
            app.button("Keep them", () => app.show(message, false)));
        app.show(message, true);
    }

    async function remove(ids) {
        const message = app.get("runs_message");
        try {
            const {deleted, refused} = await app.post("/jobs/delete", {jobs: ids, confirm: true});
            app.setText(message, refused.map(app.sentence).join(" "));
            app.show(message, refused.length);
            if (runs.opened && deleted.includes(runs.opened.id)) runs.opened = null;
            if (app.live.job && deleted.includes(app.live.job.id)) app.live.forget();
            await runs.load();
        } catch (error) {
            app.complain(error, message);
        }
    }

    /** A table of the settings in which two runs differ. */
    many.differences = async function(job, otherId) {
        const {differences} = await app.fetchJson(`/jobs/${job.id}/differences/${otherId}`);
        const other = runs.jobs.find((one) => one.id === otherId);
        if (!differences.length) return [app.el("p", {class: "help"}, app.t("Both runs have the same settings."))];
        const row = (cells, kind) => app.el("tr", {}, ...cells.map((cell) => app.el(kind, {}, cell)));
        return [app.el("table", {class: "table"},
            app.el("thead", {}, row([app.t("Setting"), job.name, other ? other.name : ""], "th")),
            app.el("tbody", {}, ...differences.map((one) => row([one.name, shown(one.one), shown(one.other)], "td"))))];
    };

    function shown(value) {
        if (value === null || value === "") return "–";
        if (Array.isArray(value)) return value.map(shown).join("\n");
        return typeof value === "object" ? JSON.stringify(value) : String(value);
    }
})(loraTrainer);
