// The training in hand where its panel is out of sight: a strip at the edge of the window, the window's title, and
// sentences for screen readers.
(function(app) {
    "use strict";

    const SPOKEN_MS = 30000; // least time between two sentences about progress
    const TITLE_MS = 5000; // how long the title tells the end
    const strip = (app.strip = {});
    let panelSeen = true;
    let shown = null; // the job that the strip is about
    let spoken = {}; // what was said last, and when

    strip.begin = function() {
        const page = document.getElementById("lora_trainer");
        page.append(
            app.el("p", {id: "spoken", class: "spoken", role: "status", "aria-live": "polite"}),
            app.el("div", {id: "strip", class: "strip page_strip", hidden: true},
                app.el("span", {id: "strip_name", class: "name"}),
                app.el("span", {id: "strip_state", class: "state"}),
                app.el("div", {class: "bar", "aria-hidden": "true"}, app.el("div", {id: "strip_fill", class: "bar_fill"})),
                app.el("span", {id: "strip_percent", class: "percent"}),
                app.el("span", {id: "strip_left", class: "status"}),
                app.button("Show it", showPanel)));
        new IntersectionObserver((entries) => {
            panelSeen = entries[entries.length - 1].isIntersecting;
            place();
        }).observe(app.get("job_name").parentElement);
        window.addEventListener("focus", () => strip.title(null));
    };

    function showPanel() {
        app.openSubTab("Train");
        app.get("live").scrollIntoView({block: "start", behavior: "smooth"});
        app.get("live").focus({preventScroll: true});
    }

    function place() {
        const visible = Boolean(shown && shown.active && !panelSeen);
        app.show(app.get("strip"), visible);
        document.getElementById("lora_trainer").toggleAttribute("data-strip", visible); // which makes room below
    }

    const percent = (job) => (job.total_steps ? Math.floor(100 * job.step / job.total_steps) + " %" : "");
    const left = (job) => (job.status === "running" && job.step && job.seconds_left !== null ? app.t("{time} left", {time: app.duration(job.seconds_left)}) : "");

    /** The job that the panel shows, or null; phase: what it does instead of training, in words. */
    strip.show = function(job, phase) {
        shown = job;
        place();
        if (!job) return;
        app.setText(app.get("strip_name"), job.name);
        app.setText(app.get("strip_state"), phase || app.live.state(job));
        app.setText(app.get("strip_percent"), percent(job));
        app.setText(app.get("strip_left"), left(job));
        app.get("strip_fill").style.width = job.total_steps ? 100 * job.step / job.total_steps + "%" : "0";
        if (job.active) strip.title([percent(job), left(job), job.name].filter(Boolean).join(" · "));
        speak(job, phase);
    };

    /** Say what changed: a state or a phase at once, progress at each quarter and not too often. */
    function speak(job, phase) {
        const state = phase || app.live.state(job);
        const what = `${job.id} ${job.status} ${state}`;
        const quarter = job.total_steps ? Math.floor(4 * job.step / job.total_steps) : 0;
        const now = Date.now();
        const same = spoken.what === what;
        if (same && (quarter === spoken.quarter || !job.active || now - spoken.time < SPOKEN_MS)) return;
        if (spoken.what === undefined && !job.active) return void (spoken = {what}); // it was over before the page was opened
        spoken = {what, quarter, time: now};
        const progress = job.status === "running" && quarter ? [percent(job), left(job)] : [];
        app.setText(app.get("spoken"), `${job.name}: ${[state, ...progress].filter(Boolean).join(", ")}`);
    }

    // -- the window's title

    let ownTitle = null;

    /** Write into the page's title, unless the host shows a progress of its own there; null gives it back. */
    strip.title = function(text) {
        if (ownTitle !== null && document.title === ownTitle.now) document.title = ownTitle.before;
        ownTitle = null;
        if (text === null || document.title.startsWith("[")) return;
        ownTitle = {before: document.title, now: `${text} - ${document.title}`};
        document.title = ownTitle.now;
    };

    /** Tell the end there, until somebody looks. */
    strip.over = function(text) {
        strip.title(text);
        if (document.hasFocus()) setTimeout(() => strip.title(null), TITLE_MS);
    };
})(loraTrainer);
