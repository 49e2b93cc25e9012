// Every run there was: a line each, opened for its settings, curve, previews and files.
(function(app) {
    "use strict";

    const PAGE = 50;
    const TYPING_MS = 250;
    // selected: numbers of the runs that are ticked. told: states of runs that led to another look at the list.
    const runs = (app.runs = {jobs: [], opened: null, loaded: false, selected: new Set(), told: new Set()});
    let loading = null; // the newest question for the list
    let openings = 0;
    let typing = null;

    runs.begin = function() {
        for (const name of ["filter", "order"]) app.get("runs_" + name).addEventListener("change", anew);
        app.get("runs_search").addEventListener("input", () => {
            clearTimeout(typing);
            typing = setTimeout(anew, TYPING_MS);
        });
        // The list is fetched when it is first seen, not with the page.
        new IntersectionObserver((entries) => {
            if (entries.some((entry) => entry.isIntersecting) && !runs.loaded) reload();
        }).observe(app.get("runs_list").parentElement);
    };

    /** Another filter or order: from the top. */
    function anew() {
        runs.jobs = [];
        runs.told.clear();
        reload();
    }

    const reload = () => runs.load().catch((error) => {
        runs.loaded = false; // it is asked for again when it is next seen
        app.complain(error, app.get("runs_count"));
    });

    /** Fetch the list, or more of it; done when what was asked last is there. */
    runs.load = function(more = false) {
        runs.loaded = true;
        const mine = (loading = fetchList(more).then((answer) => (mine === loading ? showList(answer, more) : loading)));
        return mine;
    };

    async function fetchList(more) {
        const status = app.get("runs_filter").value;
        const search = app.get("runs_search").value.trim();
        const query = new URLSearchParams({
            limit: more ? PAGE : Math.max(PAGE, runs.jobs.length), offset: more ? runs.jobs.length : 0,
            order: app.get("runs_order").value, search,
        });
        if (status) query.set("status", status);
        return {...await app.fetchJson("/jobs?" + query), filtered: Boolean(status || search)};
    }

    function showList({jobs, total, filtered}, more) {
        runs.jobs = more ? [...runs.jobs, ...jobs] : jobs;
        app.setText(app.get("runs_count"), app.t("{shown} of {total}", {shown: runs.jobs.length, total}));
        app.show(app.get("runs_more"), runs.jobs.length < total);
        app.show(app.get("runs_empty"), !total && !filtered);
        runs.many.show();
        const list = app.get("runs_list");
        if (more) return void list.append(...jobs.map(line));
        const open = list.querySelector(".lora_trainer_inside");
        list.replaceChildren(...jobs.map(line));
        if (runs.opened && !unfold(open)) runs.opened = null;
    }

    /** Put this into the line of the run that is open; false where it has none. */
    function unfold(content) {
        const node = runs.opened && app.get("run_" + runs.opened.id);
        if (!node) return false;
        node.querySelector("button").setAttribute("aria-expanded", "true");
        const before = node.querySelector(".lora_trainer_inside");
        if (before && content) before.remove();
        if (content) node.append(content);
        return true;
    }

    /** Jobs that the server told about: lines that are shown follow, new ones come on top. */
    runs.heard = function(jobs) {
        if (!runs.loaded) return;
        const status = app.get("runs_filter").value;
        let other = false; // the list may hold others now, or in another order: what runs comes first
        for (const job of jobs) {
            const index = runs.jobs.findIndex((one) => one.id === job.id);
            const before = runs.jobs[index];
            if (!before || before.status !== job.status) {
                const state = job.id + job.status;
                other = other || Boolean(before) || (!runs.told.has(state) && (!status || job.status === status));
                runs.told.add(state);
            }
            if (!before) continue;
            runs.jobs[index] = job;
            const node = app.get("run_" + job.id);
            if (!node) continue;
            app.setText(node.querySelector(".lora_trainer_state"), app.live.state(job));
            app.setText(node.querySelector(".lora_trainer_steps_done"), steps(job));
            if (before.status !== job.status || before.thumbnail !== job.thumbnail) {
                const open = node.querySelector(".lora_trainer_inside");
                node.replaceWith(line(job));
                if (runs.opened && runs.opened.id === job.id && unfold(open)) fill(job.id).catch((error) => console.error(error));
            }
        }
        if (other) reload();
    };

    const steps = (job) => (job.total_steps ? app.t("step {step} of {total}", {step: job.step, total: job.total_steps}) : "");

    function line(job) {
        const picture = job.thumbnail
            ? app.el("img", {src: app.fileUrl(job.id, job.thumbnail), alt: "", loading: "lazy"})
            : app.el("span", {class: "no_picture", "aria-hidden": "true"});
        const state = app.el("span", {class: "state"}, app.live.state(job));
        state.dataset.status = job.status;
        return app.el("li", {id: "run_" + job.id, class: "run"}, runs.many.tick(job),
            app.el("button", {type: "button", class: "line", "aria-expanded": "false", onclick: () => runs.toggle(job.id)},
                picture,
                app.el("span", {class: "name"}, job.name),
                state,
                app.el("span", {class: "steps_done"}, steps(job)),
                app.el("span", {class: "model"}, job.base_model),
                app.el("time", {class: "date"}, app.date(job.finished || job.started || job.created))));
    }

    runs.toggle = function(id) {
        if (runs.opened && runs.opened.id === id) runs.close();
        else runs.open(id).catch((error) => app.complain(error, app.get("runs_count")));
    };

    runs.close = function() {
        if (!runs.opened) return;
        const node = app.get("run_" + runs.opened.id);
        if (node) {
            const inside = node.querySelector(".lora_trainer_inside");
            if (inside) inside.remove();
            node.querySelector("button").setAttribute("aria-expanded", "false");
        }
        runs.opened = null;
    };

    /** Show one run, going to the sub-tab if need be. */
    runs.open = async function(id) {
        app.openSubTab("Runs");
        runs.close();
        const mine = ++openings;
        if (!runs.loaded || !app.get("run_" + id)) {
            app.get("runs_filter").value = app.get("runs_search").value = "";
            await runs.load();
        }
        if (mine !== openings || !app.get("run_" + id)) return; // another one was opened meanwhile, or it is gone
        runs.opened = {id};
        unfold(null);
        await fill(id);
        const node = app.get("run_" + id);
        if (node) node.scrollIntoView({block: "nearest"});
    };

    /** Show in the opened run what there is of it now; nothing moves but that. */
    async function fill(id) {
        const [job, {points}, {events}, {files}] = await Promise.all([
            app.fetchJson("/jobs/" + id), app.fetchJson(`/jobs/${id}/metrics`),
            app.fetchJson(`/jobs/${id}/events?limit=5000`), app.fetchJson(`/jobs/${id}/files`),
        ]);
        if (runs.opened && runs.opened.id === id) unfold(inside(job, points, events, files));
    }

    function inside(job, points, events, files) {
        const message = app.el("p", {class: "problem", role: "alert", hidden: true});
        const reading = app.el("span");
        const place = app.el("div", {class: "curve"});
        const step = app.el("span");
        const table = app.el("div", {class: "differences"});
        const strip = app.el("div", {class: "previews"});
        const previews = new app.Previews(strip, step, async(choice) => {
            try {
                const done = await runs.publish(job, choice);
                Object.assign(job, done); // whose buttons go by it
                previews.isThere(app.live.stepThere(done), done.chosen_weight);
            } catch (error) {
                app.complain(error, message);
            }
        });
        const node = app.el("div", {class: "inside"},
            ...[...(job.error ? [app.sentence(job.error)] : []), ...app.remarks(job)].map((sentence) => app.el("p", {class: "notice"}, sentence)),
            app.el("div", {class: "row"}, ...app.live.actions(job, previews).map((action) => app.button(...action)),
                job.started ? app.button("Report", () => window.open(app.reportUrl(job.id), "_blank", "noopener")) : null,
                job.lora ? publishing(job, message) : null,
                job.active ? null : deleting(job, message)),
            message,
            app.el("div", {class: "panels"},
                app.el("figure", {class: "panel"}, app.el("figcaption", {}, app.el("span", {}, app.t("Curves")), reading), place),
                app.el("figure", {class: "panel"}, app.el("figcaption", {}, app.el("span", {}, app.t("Previews")), step), strip)),
            table,
            app.el("details", {class: "quiet"}, app.el("summary", {}, app.t("Files")), fileList(job, files)),
            app.el("details", {class: "quiet"}, app.el("summary", {}, app.t("Settings")),
                app.el("pre", {tabindex: 0}, job.effective_config || job.config)));
        const curve = new app.Curve(place, reading, {
            compare: runs.jobs.filter((one) => one.id !== job.id),
            fetchPoints: async(id) => (await app.fetchJson(`/jobs/${id}/metrics`)).points,
            onCompared: async(ids) => table.replaceChildren(...(await Promise.all(ids.map((id) => runs.many.differences(job, id)))).flat()),
        });
        curve.set(points, job.name);
        previews.onSteps = (marks) => curve.mark(marks, (step) => previews.show(step));
        previews.isThere(app.live.stepThere(job), job.chosen_weight);
        previews.add(events);
        return node;
    }

    const fileList = (job, files) => app.el("ul", {class: "files"}, ...files
        .filter((file) => !/(^|\/)cache\//.test(file.path))
        .map((file) => app.el("li", {},
            app.el("a", {href: app.fileUrl(job.id, file.path), download: file.path.split("/").pop()}, file.path.replace(/^output\//, "")),
            " ", app.el("span", {class: "help"}, app.bytes(file.size)))));

    /** Put its LoRA into the Lora tab: {name, step, overwrite}, each of which may be left out. */
    runs.publish = async function(job, choice) {
        const done = await app.post(`/jobs/${job.id}/publish`, {name: job.published || job.name, ...choice});
        app.host.refreshPicker();
        return done;
    };

    function publishing(job, message) {
        const name = app.el("input", {type: "text", value: job.published || job.name, "aria-label": app.t("Name in the Lora tab")});
        const go = async(overwrite) => {
            try {
                const done = await runs.publish(job, {name: name.value.trim(), overwrite});
                const what = {name: done.published, step: done.published_step};
                app.setText(message, app.t(done.published_step === null ? "It is in your Lora tab as {name}." : "Your Lora tab keeps {name} as it was at step {step}.", what));
                app.show(message, true);
                app.live.look();
            } catch (error) {
                app.complain(error, message);
                if (error.problems && error.problems.some(app.form.saysTaken)) {
                    message.append(" ", app.button("Replace it", () => go(true)));
                }
            }
        };
        return app.el("span", {class: "inline"}, name, app.button(job.published ? "Publish again" : "Publish", () => go(false)));
    }

    /** Two clicks: the second is asked for, with what it takes away. */
    function deleting(job, message) {
        return app.button("Delete …", () => {
            message.replaceChildren(
                app.t("This deletes the run's settings, states, previews and logs. The published LoRA and your pictures stay."), " ",
                app.button("Delete it", async() => {
                    try {
                        await app.call("DELETE", "/jobs/" + job.id, {confirm: true});
                        if (runs.opened && runs.opened.id === job.id) runs.opened = null;
                        if (app.live.job && app.live.job.id === job.id) app.live.forget();
                        await runs.load();
                    } catch (error) {
                        app.complain(error, message);
                    }
                }, "danger"), " ",
                app.button("Keep it", () => app.show(message, false)));
            app.show(message, true);
        });
    }

    /** Put a run's settings into the form, to be changed and started; or to begin from its LoRA. */
    runs.again = async function(job, continues) {
        const detail = await app.fetchJson("/jobs/" + job.id);
        const {settings} = await app.post("/settings/check", {yaml: detail.config});
        const {output_name: name, init_lora: origin, resume, overwrite, ...rest} = settings;
        // Its own beginning, unless its LoRA is that now; a hidden folder of the server cannot be named again.
        const begins = continues || !origin || origin.startsWith("<") ? {} : {init_lora: origin};
        app.openSubTab("Train");
        const settled = {...rest, ...begins, output_name: nextName(name || job.name)};
        app.form.fill(settled, {continues: continues ? {id: job.id, name: job.name, pictures: rest.train_data_dir} : null});
        app.get("form").scrollIntoView({block: "start"});
    };

    /** my_face_v2 -> my_face_v3, my_face -> my_face_2. */
    function nextName(name) {
        const match = /^(.*?)(\d+)$/.exec(name);
        return match ? match[1] + (Number(match[2]) + 1) : name + "_2";
    }
})(loraTrainer);
