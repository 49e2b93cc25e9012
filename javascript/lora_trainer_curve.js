// The curves of one run, or of several laid over each other: which measure is drawn, how smooth, on which scale; and the
// previews on the time line.
(function(app) {
    "use strict";

    const MAX_POINTS = 4000;
    const COLORS = 6; // series0 … series5 in the style sheet
    const PARTS = {loss: "Loss", validation: "Loss on the same noise", drift: "Drift from the base model", grad_norm: "Gradient norm", lr: "Learning rate", speed: "Steps per second"};
    const TIPS = {
        loss: "How far the model's guesses are from your pictures: it should sink and then settle. It always trembles; the thick line is its average.",
        validation: "Of held-out and of trained pictures, with the same noise each time: where the first rises and the second falls, it memorises.",
        drift: "How far the model moved for captions that do not name what is learned: less keeps more of what it knew.",
        grad_norm: "How strongly a step pulls at the weights, before clipping: high peaks mean a learning rate that is too high.",
    };
    const CHOSEN = {measure: "loss", smoothing: 10, log: false}; // smoothing: percent of the steps that are averaged

    /** Curves in node; reading is where the values at the pointer are written. compare: the runs that may be laid over,
     * as {id, name}; fetchPoints(id) gives their points. onCompared(ids): after another one was laid over or taken away. */
    app.Curve = class {
        constructor(node, reading, {compare = [], fetchPoints, onCompared} = {}) {
            Object.assign(this, {own: {id: null, name: "", points: []}, others: [], marks: [], fetchPoints, onCompared});
            this.chosen = {...CHOSEN, ...app.recall("curve")};
            const change = (name, value) => {
                this.chosen[name] = value;
                app.remember("curve", this.chosen);
                this.draw();
            };
            this.measure = app.el("select", {"aria-label": app.t("Measure"), onchange: () => change("measure", this.measure.value)});
            this.smoothing = app.el("input", {type: "range", min: 0, max: 50, step: 1, value: this.chosen.smoothing, oninput: () => change("smoothing", Number(this.smoothing.value))});
            this.log = app.el("input", {type: "checkbox", onchange: () => change("log", this.log.checked)});
            this.log.checked = this.chosen.log;
            this.compare = compare.length ? app.el("select", {"aria-label": app.t("Lay another run's curve over it"), onchange: () => this.lay(compare)},
                app.el("option", {value: ""}, app.t("compare with …")), ...compare.map((one) => app.el("option", {value: one.id}, one.name))) : null;
            this.smoothField = app.el("label", {class: "curve_choice", title: app.t("The average of each step with those before it")}, app.t("Smoothing"), this.smoothing);
            const place = app.el("div", {class: "curve_plot"});
            this.timeline = app.el("div", {class: "timeline", role: "group", "aria-label": app.t("Previews on the time line")});
            this.legend = app.el("div", {class: "legend"});
            node.replaceChildren(
                app.el("div", {class: "curve_choices"}, this.measure, this.smoothField, app.el("label", {class: "curve_choice"}, this.log, app.t("Log scale")), this.compare),
                place, this.timeline, this.legend);
            this.plot = new app.Plot(place, reading, (step) => this.say(step));
            this.plot.onDrawn = () => this.placeMarks();
        }

        /** The points of the run itself, as the server gives them: one of each step, and measurements with a kind. */
        set(points, name = "") {
            this.own = {id: null, name, points: app.thinned(points)};
            this.draw();
        }

        /** Previews: {step, address} in order; choose(step) shows one. Nodes change only where they are others. */
        mark(marks, choose) {
            const key = JSON.stringify(marks);
            if (key === this.marked) return;
            this.marked = key;
            this.marks = marks.map(({step, address}) => ({step, node: app.el("button", {
                type: "button", class: "mark", "aria-label": step ? app.t("Preview at step {n}", {n: step}) : app.t("Preview before the training"), onclick: () => choose(step),
            }, app.el("span", {class: "mark_picture"}, address ? app.el("img", {src: address, alt: "", loading: "lazy"}) : "", step ? app.t("step {n}", {n: step}) : app.t("before")))}));
            this.timeline.replaceChildren(...this.marks.map((one) => one.node));
            this.placeMarks();
        }

        placeMarks() {
            app.show(this.timeline, this.marks.length && this.plot.x);
            const last = this.plot.x ? this.plot.x(this.plot.last) : 0;
            for (const {step, node} of this.marks) {
                if (!this.plot.x) continue;
                const x = this.plot.x(Math.min(step, this.plot.last));
                node.style.left = x + "px";
                node.classList.toggle("lora_trainer_late", x > last / 2); // its picture opens to the other side
            }
        }

        /** Lay the run over that was chosen in the list. */
        lay(runs) {
            const id = Number(this.compare.value);
            this.compare.value = "";
            const run = runs.find((one) => one.id === id);
            if (!run || this.others.some((one) => one.id === id)) return null;
            return app.attempt(async() => {
                const points = app.thinned(await this.fetchPoints(id));
                if (this.others.some((one) => one.id === id)) return null;
                this.others.push({id, name: run.name, points});
                this.draw();
                return this.onCompared(this.others.map((one) => one.id));
            }, this.compare);
        }

        take(id) {
            this.others = this.others.filter((one) => one.id !== id);
            this.draw();
            return this.onCompared(this.others.map((one) => one.id));
        }

        draw() {
            const runs = [this.own, ...this.others];
            const there = Object.keys(PARTS).filter((name) => name === "loss" || runs.some((run) => values(run.points, name).length));
            const measure = there.includes(this.chosen.measure) ? this.chosen.measure : "loss";
            if (this.measure.childElementCount !== there.length) {
                this.measure.replaceChildren(...there.map((name) => app.el("option", {value: name}, app.t(PARTS[name]))));
            }
            this.measure.value = measure;
            this.measure.title = TIPS[measure] ? app.t(TIPS[measure]) : "";
            const smooth = ["loss", "grad_norm", "speed"].includes(measure);
            app.show(this.smoothField, smooth);
            this.lines = runs.flatMap((run, index) => linesOf(run, measure, smooth ? this.chosen.smoothing / 100 : 0).map((line) => ({...line, run, series: index % COLORS})));
            this.plot.set(app.t("{measure} over the steps", {measure: app.t(PARTS[measure])}), this.lines, this.chosen.log);
            this.explain(runs);
        }

        /** The legend: kinds of lines where there is one run, names where there are several. */
        explain(runs) {
            const entries = runs.length > 1
                ? runs.map((run, index) => ({kind: "mean", series: index % COLORS, name: run.name, id: run.id}))
                : this.lines.filter((line) => line.points.length).map((line) => ({...line, name: app.t(line.name)}));
            const key = JSON.stringify(entries.map(({kind, series, name}) => [kind, series, name]));
            if (this.legend.dataset.key === key) return;
            this.legend.dataset.key = key;
            this.legend.replaceChildren(...(entries.length > 1 ? entries : []).map(({kind, series, name, id}) => app.el("span", {class: "legend_entry"},
                app.el("span", {class: `legend_line ${kind} series${series}`, "aria-hidden": "true"}), name,
                id && app.el("button", {type: "button", class: "legend_take", "aria-label": app.t("Take {name} away", {name}), onclick: (event) => app.attempt(() => this.take(id), event.currentTarget)}, "×"))));
        }

        /** The values at a step, in words. */
        say(step) {
            const several = this.others.length > 0;
            const parts = this.lines.filter((line) => line.points.length && !(several && line.kind === "raw")).map((line) => {
                const [at, value] = app.nearest(line.points, step);
                const name = several ? line.run.name + (line.dots ? ` (${app.t(line.name)})` : "") : app.t(line.name);
                return app.t("{name} {value}", {name, value: app.loss(value)}) + (at === step || !line.dots ? "" : ` (${app.t("step {n}", {n: at})})`);
            });
            return [app.t("step {n}", {n: step}), ...parts].join(" · ");
        }
    };

    /** [step, value] of a measure. */
    function values(points, name) {
        const measured = ["validation", "training", "drift"].includes(name);
        const found = points.filter((one) => (one.kind === "validation") === measured);
        const value = name === "speed" ? (one) => (one.seconds ? 1 / one.seconds : null) : (one) => one[name];
        return found.map((one) => [one.step, value(one)]).filter(([, number]) => typeof number === "number");
    }

    /** What is drawn of a run: {kind, name, points, dots}. */
    function linesOf({points}, measure, smoothing) {
        const dotted = (name, title, kind = "measured " + name) => ({kind, name: title, points: values(points, name), dots: true});
        const held = [dotted("validation", "held out"), dotted("training", "trained")];
        if (measure === "validation") return held;
        if (measure === "drift") return [dotted("drift", PARTS.drift, "measured drift")];
        const raw = values(points, measure);
        const lines = measure === "lr" || !smoothing
            ? [{kind: "mean", name: PARTS[measure], points: raw}]
            : [{kind: "raw", name: "each step", points: raw}, {kind: "mean", name: "average", points: average(raw, smoothing)}];
        return measure === "loss" ? [...lines, ...held] : lines;
    }

    /** Exponential average over a share of what there is, without the bias of its beginning. */
    function average(points, share) {
        const keep = 1 - 1 / Math.max(5, points.length * share);
        let sum = 0;
        let weight = 0;
        return points.map(([step, value]) => {
            sum = keep * sum + (1 - keep) * value;
            weight = keep * weight + (1 - keep);
            return [step, sum / weight];
        });
    }

    const AVERAGED = ["loss", "grad_norm", "seconds"];

    /** No more steps than can be drawn, and all measurements: neighbours become one with their mean, as on the server. */
    app.thinned = function(points) {
        const every = Math.ceil(points.filter((one) => !one.kind).length / MAX_POINTS);
        if (every < 2) return points;
        const found = [];
        let group = [];
        const close = () => {
            if (!group.length) return;
            const means = AVERAGED.map((name) => [name, group.map((one) => one[name]).filter((value) => typeof value === "number")]);
            found.push({...group[group.length - 1], ...Object.fromEntries(means.map(([name, all]) => [name, all.length ? all.reduce((one, other) => one + other) / all.length : null]))});
            group = [];
        };
        for (const one of points) {
            if (one.kind) found.push(one);
            else if (group.push(one) === every || !found.length) close();
        }
        close();
        return found.sort((one, other) => one.step - other.step);
    };
})(loraTrainer);
