// The training in hand, read from the server again and again: nothing is lost by a reload, and all pages agree.
(function(app) {
    "use strict";

    const PACE = {running: 1000, idle: 3000, away: 10000}; // ms between two looks; away: nobody sees the page
    const COMPLAINT_MS = 20000;
    const OVER = ["finished", "stopped", "failed", "interrupted"];

    // job: what the panel shows. details: its settings, by name. asked: whether they are here or on their way.
    // jobs: every job heard of since the page was opened.
    // inPicker: which weights the LoRA pickers were last told of, by job.
    const live = (app.live = {
        job: null, details: null, asked: false, points: [], lastEvent: 0, seenRunning: new Set(), ended: new Map(), looking: null, inPicker: new Map(),
    });
    let cursor = null;
    let timer = null;
    let trouble = ""; // what keeps the server from training, or from answering
    let complaint = ""; // what went wrong with something that was asked for

    live.begin = function() {
        live.curve = new app.Curve(app.get("curve"), app.get("curve_reading"));
        live.previews = new app.Previews(app.get("previews"), app.get("preview_step"), (choice) =>
            app.runs.publish(live.job, choice).then(live.look, live.complain));
        live.previews.onSteps = (marks) => live.curve.mark(marks, (step) => live.previews.show(step));
        app.get("log_box").addEventListener("toggle", () => loadLog().catch(live.complain));
        document.addEventListener("visibilitychange", () => document.hidden || live.look());
        live.look();
    };

    /** Ask now; two askers share one answer. */
    live.look = function() {
        if (!live.looking) {
            clearTimeout(timer);
            live.looking = ask().finally(() => {
                live.looking = null;
                const running = live.job && live.job.active;
                timer = setTimeout(live.look, document.hidden ? (running ? PACE.idle : PACE.away) : running ? PACE.running : PACE.idle);
            });
        }
        return live.looking;
    };

    async function ask() {
        try {
            const answer = await app.fetchJson("/status" + (cursor ? "?since=" + encodeURIComponent(cursor) : ""));
            cursor = answer.cursor;
            if (live.job && !live.asked) loadDetails(live.job);
            if (answer.unchanged) return;
            app.knowBase(answer.base).catch(live.complain);
            trouble = answer.trouble ? app.sentence(answer.trouble) : "";
            showTrouble();
            await take(answer);
        } catch (error) {
            trouble = app.reason(error);
            showTrouble();
            cursor = null; // a server that comes back is asked for everything
        }
    }

    function showTrouble() {
        const text = [trouble, complaint].filter(Boolean).join(" ");
        app.setText(app.get("trouble"), text);
        app.show(app.get("trouble"), text);
    }

    /** Say above the page what went wrong with something that was asked for, long enough to be read. */
    live.complain = (error) => live.say(app.reason(error));

    live.say = function(text) {
        const mine = (complaint = text);
        showTrouble();
        setTimeout(() => {
            if (complaint === mine) complaint = "";
            showTrouble();
        }, COMPLAINT_MS);
    };

    async function take(answer) {
        const {running, changed} = answer;
        if (running) live.seenRunning.add(running.id);
        const shown = running || changed.find((job) => job.id === answer.metrics_job) || (live.job && changed.find((job) => job.id === live.job.id));
        if (answer.metrics_job !== null) takePoints(answer);
        else if (live.job) live.forget(); // another page deleted it
        if (shown && (running || shown.id !== app.recall("closed"))) await show(shown);
        app.queue.show(answer.queue, answer.interrupted);
        for (const job of changed) {
            if (!job.finished) continue;
            if (live.seenRunning.delete(job.id)) over(job);
            else live.ended.set(job.id, job);
        }
        app.runs.heard([running, ...changed, ...answer.queue].filter(Boolean));
    }

    /** Tell the end of a job that was just started: it may have come before the answer to the start did. */
    live.follow = function(id) {
        const job = live.ended.get(id);
        if (job) over(job);
        else live.seenRunning.add(id);
    };

    function takePoints({metrics_job: job, points, points_follow: follow}) {
        if (!follow || live.pointsOf !== job) live.points = [];
        live.pointsOf = job;
        live.points = app.thinned([...live.points, ...points]);
    }

    async function show(job) {
        const other = !live.job || live.job.id !== job.id || live.job.attempt !== job.attempt;
        live.job = job;
        if (other) {
            Object.assign(live, {details: null, asked: false, lastEvent: 0});
            live.previews.clear();
            live.previews.compare(false);
            live.curve.set([]);
            loadDetails(job);
        }
        app.show(app.get("live"), true);
        app.show(app.get("preview_panel"), job.task !== "text");
        if (live.switchesBack && job.status !== "waiting") live.tellSwitchedBack();
        if (live.pointsOf === job.id) live.curve.set(live.points);
        pickerKnows(job);
        showStrip(job);
        showMessage(job);
        live.previews.isThere(live.stepThere(job), job.chosen_weight);
        showButtons(job);
        await loadEvents(job);
        if (app.get("log_box").open) await loadLog();
    }

    /** The LoRA pickers list what was put there since they were drawn. */
    function pickerKnows(job) {
        const there = job.published && `${job.published} ${job.published_step}`;
        if (there && live.inPicker.get(job.id) !== there) app.host.refreshPicker();
        live.inPicker.set(job.id, there);
    }

    async function loadDetails(job) {
        live.asked = true;
        let settings;
        try {
            const {effective_config: yaml} = await app.fetchJson("/jobs/" + job.id);
            ({settings} = await app.post("/settings/check", {yaml}));
        } catch (error) {
            // Of a server that was away the next look asks again; what it refuses, it would refuse again.
            live.asked = error.status >= 400 && error.status < 500;
            return;
        }
        if (live.job && live.job.id === job.id) {
            live.details = settings;
            if (!settings.preview_prompts.length) live.previews.explain(app.t("No preview prompt is set (Advanced, Saving and previews)."));
            showStrip(live.job);
        }
    }

    async function loadEvents(job) {
        const {events} = await app.fetchJson(`/jobs/${job.id}/events?since=${live.lastEvent}`);
        if (!events.length || !live.job || live.job.id !== job.id) return;
        live.lastEvent = events[events.length - 1].id;
        live.previews.add(events);
    }

    async function loadLog() {
        const box = app.get("log");
        if (!live.job || !app.get("log_box").open) return;
        const {id} = live.job;
        const {text} = await app.fetchJson(`/jobs/${id}/log`);
        if (!live.job || live.job.id !== id) return;
        const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 20;
        app.setText(box, text || app.t("Nothing yet."));
        if (atEnd) box.scrollTop = box.scrollHeight;
    }

    // -- the strip

    const STATES = {
        queued: "waiting for its turn", running: "training", paused: "paused", waiting: "waiting for the model",
        stopping: "stopping", finished: "finished", stopped: "stopped", failed: "failed", interrupted: "interrupted",
    };
    live.state = (job) => app.t(STATES[job.status] || job.status);

    const PHASES = {
        starting: "Preparing …", rows: "Reading the rows", captioning: "Describing the pictures", pictures: "Looking at the pictures",
        model: "Preparing the model", trying: "Trying one step", latents: "Encoding the pictures", captions: "Encoding the captions",
        known: "Drawing what the model knows",
        measuring: "Measuring the held-out pictures", previews: "Drawing the previews", hashing: "Computing the base model's hash", saving: "Saving",
        merging: "Merging into the base model", publishing: "Putting it into your Lora tab",
        verifying: "Loading it back and trying it",
    };

    function showStrip(job) {
        const share = job.total_steps ? job.step / job.total_steps : 0;
        app.setText(app.get("job_name"), job.name);
        app.setText(app.get("job_state"), live.state(job));
        app.get("job_state").dataset.status = job.status;
        app.setText(app.get("job_base"), job.base_model ? app.t("on {model}", {model: job.base_model}) : "");
        app.setText(app.get("job_percent"), job.total_steps ? Math.floor(share * 100) + " %" : "");
        app.get("bar_fill").style.width = share * 100 + "%";
        app.get("bar").setAttribute("aria-valuenow", Math.floor(share * 100));
        app.setText(app.get("job_facts"), facts(job).join("  ·  "));
        app.strip.show(job, PHASES[job.phase] && app.t(PHASES[job.phase]));
    }

    function facts(job) {
        const phase = job.active && PHASES[job.phase] && app.t(PHASES[job.phase]) + (job.phase_total ? ` ${job.phase_done}/${job.phase_total}` : "");
        if (!job.total_steps) return job.active ? [phase || app.t("Preparing …")] : [];
        if (phase && !job.step) return [phase];
        if (phase) return [phase, app.t("step {step} of {total}", {step: job.step, total: job.total_steps})];
        const parts = [app.t("step {step} of {total}", {step: job.step, total: job.total_steps}), app.t("epoch {n}", {n: job.epoch})];
        if (job.active && job.speed) parts.push(app.speed(job.speed));
        if (job.active && job.seconds_left !== null && job.status === "running") parts.push(app.t("{time} left", {time: app.duration(job.seconds_left)}));
        if (job.loss !== null) parts.push(app.t("loss {n}", {n: app.loss(job.loss)}));
        if (job.memory) parts.push(app.t("memory {n}", {n: app.bytes(job.memory)}));
        if (job.active && live.details) parts.push(nextSave(job, live.details));
        if (!job.active && job.seconds) parts.push(app.t("took {time}", {time: app.duration(job.seconds)}));
        return parts;
    }

    function nextSave(job, settings) {
        const perEpoch = settings.max_train_steps ? null : job.total_steps / settings.epochs; // else it is not known
        const every = [settings.save_steps, settings.save_epochs && perEpoch && Math.round(settings.save_epochs * perEpoch)].filter(Boolean);
        const next = Math.min(job.total_steps, ...every.map((steps) => (Math.floor(job.step / steps) + 1) * steps));
        return next < job.total_steps ? app.t("next save at step {n}", {n: next}) : app.t("next save at the end");
    }

    function showMessage(job) {
        const lines = [];
        if (job.status === "waiting") lines.push(app.said(job.phase));
        if (job.error) lines.push(app.sentence(job.error));
        if (job.status === "interrupted") lines.push(app.queue.howItWasCutOff(job));
        if (job.published) lines.push(whatIsThere(job));
        if (job.lora && job.task === "text") lines.push(app.t("The LoRA is the folder {path} among the files of this run, as PEFT, vLLM and llama.cpp's converter read it.", {path: job.lora.replace(/\/[^/]*$/, "")}));
        if (job.verified && app.host.hasPrompt()) lines.push(app.t("Loaded back and tried: every part fits, and it changes the picture."));
        lines.push(...app.remarks(job));
        const box = app.get("job_message");
        const text = lines.join("\n");
        if (box.dataset.text !== text) {
            box.dataset.text = text;
            box.replaceChildren(...lines.map((line) => app.el("p", {}, line)));
        }
        box.classList.toggle("lora_trainer_problem", Boolean(job.error));
        box.setAttribute("role", job.error ? "alert" : "status");
        app.show(box, lines.length);
    }

    /** The step of the weights that the Lora tab has of this job; null for none. */
    live.stepThere = (job) => (job.published ? job.published_step || job.step : null);

    /** Which of its weights the Lora tab has: the finished ones, or what was saved last on the way. */
    function whatIsThere(job) {
        const what = {name: job.published, step: job.published_step};
        if (!app.host.hasPrompt()) return app.t("It is in the folder of LoRAs as {name}.", what);
        if (job.published_step === null) return app.t("It is in your Lora tab as {name}.", what);
        if (job.active) return app.t("{name} can be tried in txt2img already, as it was at step {step}; each save renews it.", what);
        if (job.published_step === job.recommended_step) return app.t("{name} is in your Lora tab as it was at the recommended step {step}.", what);
        return app.t("Your Lora tab keeps {name} as it was at step {step}.", what);
    }

    // -- what can be done: lora_trainer_live_actions.js

    function showButtons(job) {
        const actions = live.actions(job, live.previews);
        if (OVER.includes(job.status)) {
            actions.push(["Files", () => app.runs.open(job.id)], ["Close", () => close(job)]);
        }
        const row = app.get("job_buttons");
        const key = JSON.stringify([job.id, job.status, job.published, job.chosen_weight, ...actions.map(([text]) => text)]);
        if (row.dataset.key === key) return; // the buttons stay while they mean the same: a focus is not lost
        row.dataset.key = key;
        row.replaceChildren(...actions.map((action) => app.button(...action)));
    }

    function close(job) {
        app.remember("closed", job.id);
        app.show(app.get("live"), false);
        app.strip.show(null);
        app.queue.showInterrupted();
    }

    /** The job of the panel was deleted. */
    live.forget = function() {
        live.job = null;
        app.strip.show(null);
        app.show(app.get("live"), false);
    };

    live.focus = function(id) {
        const node = app.get(live.job && live.job.id === id ? "live" : "queue");
        node.scrollIntoView({block: "nearest", behavior: "smooth"});
    };

    // -- telling the end

    live.askForNotifications = function() {
        if (wanted() && Notification.permission === "default") Notification.requestPermission();
    };
    const wanted = () => "Notification" in window && (typeof opts === "undefined" || opts.lora_trainer_notify !== false);

    function over(job) {
        const text = `${job.name}: ${live.state(job)}`;
        app.strip.over(text);
        pickerKnows(job);
        app.form.told = job.error && job.error.field ? job.error : null;
        if (wanted() && Notification.permission === "granted") {
            const body = job.error ? app.sentence(job.error) : job.published ? whatIsThere(job) : "";
            try {
                new Notification(text, {body, tag: "lora_trainer_" + job.id});
            } catch (error) {
                console.debug("no notification:", error); // phones have only those of service workers
            }
        }
        app.estimate.now(); // what it took is now known; and what it said of a setting is shown
    }
})(loraTrainer);
