// What can be done with the training in hand, or with one that has ended.
(function(app) {
    "use strict";

    const live = app.live;

    live.command = (job, command) => app.post(`/jobs/${job.id}/${command}`).then(live.look);

    /** Buttons for a job: [text, what it does, kind]. previews: where its pictures are shown. */
    live.actions = function(job, previews) {
        const to = (command) => () => live.command(job, command);
        const tryIt = job.published && app.host.hasPrompt() && ["Try it", () => app.host.tryIt(job), "primary"];
        if (job.active || job.status === "paused") {
            return [
                job.status === "waiting" && job.switches_back && ["Switch back", () => switchBack(job), "primary"],
                job.status === "paused" ? ["Resume", to("resume"), "primary"] : job.status !== "stopping" && ["Pause", to("pause")],
                job.active && ["Save now", to("save-now")],
                job.active && job.task !== "text" && ["Preview now", to("preview-now")],
                job.active && ["Stop and save", to("stop-and-save")],
                ["Stop", to("stop")],
                tryIt && [tryIt[0], tryIt[1]],
            ].filter(Boolean);
        }
        const again = () => app.runs.again(job, false);
        const isChange = app.ways.isChange(job.task);
        const draw = () => compare(previews, job, true) || previews.grids.draw();
        return [
            tryIt,
            job.fails_again && ["Run again with changes", again, "primary"],
            job.status !== "finished" && !job.fails_again && ["Resume", to("resume"), "primary"],
            (job.lora || job.published) && job.task !== "text" && ["Compare checkpoints", () => compare(previews, job, !previews.comparing)],
            (job.lora || job.published) && job.task !== "text" && (isChange ? ["Draw a strip", draw, "primary"] : ["Draw a grid", draw]),
            job.lora && ["Continue from it", () => app.runs.again(job, true)],
            !job.fails_again && ["Run again with changes", again],
            job.fails_again && ["Resume", to("resume")],
        ].filter(Boolean);
    };

    /** The host's own fields have no way to follow the server, but that of the checkpoint: see app.knowBase. */
    live.tellSwitchedBack = function() {
        live.switchesBack = false;
        live.say(app.t("The training goes on with what was chosen when it began. The WebUI's own fields show it when the page is loaded again."));
    };

    /** The host's own field of the checkpoint follows when the server has switched: see app.knowBase. */
    function switchBack(job) {
        live.switchesBack = true;
        return live.command(job, "switch-back");
    }

    function compare(previews, job, comparing) {
        previews.compare(comparing, job);
        previews.node.scrollIntoView({block: "nearest", behavior: "smooth"});
    }
})(loraTrainer);
