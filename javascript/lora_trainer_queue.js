// The jobs that wait: those of the queue, and those that were cut off as a server ended.
(function(app) {
    "use strict";

    const queue = (app.queue = {});
    let interrupted = [];

    /** Why a job of the queue will not start, or not yet. */
    function why(job) {
        const {live} = app;
        if (job.error) return app.sentence(job.error);
        const first = live.job && live.job.active && live.job.status === "paused" && live.job;
        return first && job.status === "queued" ? app.t("until {name} goes on or is stopped", {name: first.name}) : "";
    }

    /** A job that has not begun is paused and resumed in its place in the queue. */
    function pausing(job) {
        const paused = job.status === "paused";
        const node = app.button(paused ? "Resume" : "Pause", () => app.live.command(job, paused ? "start" : "pause"), "link");
        node.title = paused ? app.t("Takes its place in the queue again.") : app.t("Lets the others go first, until you resume it.");
        return node;
    }

    queue.show = function(jobs, cutOff) {
        showWaiting(jobs);
        interrupted = cutOff;
        queue.showInterrupted();
    };

    function showWaiting(jobs) {
        const {live} = app;
        app.show(app.get("queue"), jobs.length);
        const row = (job, index) => app.el("li", {},
            app.el("span", {class: "name"}, job.name), app.el("span", {class: "state"}, live.state(job)),
            app.el("span", {class: "why"}, why(job)),
            app.el("span", {class: "row"},
                index > 0 && job.status === "queued" ? app.button("First", () => app.post("/jobs/reorder", {jobs: [job.id]}).then(live.look), "link") : null,
                pausing(job),
                app.button("Remove", () => live.command(job, "stop"), "link")));
        const list = app.get("queue_list");
        const key = JSON.stringify(jobs.map((job) => [job.id, job.status, why(job)]));
        if (list.dataset.key === key) return;
        list.dataset.key = key;
        list.replaceChildren(...jobs.map(row));
    }

    queue.howItWasCutOff = function(job) {
        const values = {name: job.name, step: job.step, total: job.total_steps, saved: job.saved_step};
        if (!job.step) return app.t("{name} was cut off, as the WebUI ended, before its first step.", values);
        if (!job.saved_step) return app.t("{name} was cut off, as the WebUI ended, at step {step} of {total}. Nothing was saved before; it begins anew.", values);
        return app.t("{name} was cut off, as the WebUI ended, at step {step} of {total}. It goes on from step {saved}.", values);
    };

    /** Offer what was cut off, but for the job that the panel shows with the same words. */
    queue.showInterrupted = function() {
        const {live} = app;
        const shown = live.job && !app.get("live").hidden ? live.job.id : null;
        const jobs = interrupted.filter((job) => job.id !== shown);
        app.show(app.get("interrupted"), jobs.length);
        const list = app.get("interrupted_list");
        const key = JSON.stringify(jobs.map((job) => [job.id, job.attempt]));
        if (list.dataset.key === key) return;
        list.dataset.key = key;
        list.replaceChildren(...jobs.map((job) => app.el("li", {},
            app.el("span", {}, queue.howItWasCutOff(job)),
            app.el("span", {class: "row"},
                app.button("Resume", () => live.command(job, "resume"), "primary"),
                app.button("Leave it", () => live.command(job, "stop"), "link")))));
    };
})(loraTrainer);
