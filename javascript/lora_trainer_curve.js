// The loss curve: every step faint, its average strong; where pictures are held out, their loss and that of trained ones
// as lines with dots. Lines change in place; no node comes or goes while it grows.
(function(app) {
    "use strict";

    const HEIGHT = 220;
    const MARGIN = {left: 46, right: 10, top: 10, bottom: 22};
    const MAX_POINTS = 4000;

    /** A curve in node; reading is where the value under the pointer is written. */
    app.Curve = class {
        constructor(node, reading) {
            this.reading = reading;
            this.series = [];
            this.svg = app.el("svg", {class: "plot", role: "img", "aria-label": app.t("Loss over the steps"), height: HEIGHT});
            this.lines = [0, 1].map((index) => ({
                raw: app.el("path", {class: "raw series" + index}),
                mean: app.el("path", {class: "mean series" + index}),
            }));
            this.measured = ["validation", "training"].map((name) => ({name, line: app.el("path", {class: "measured " + name})}));
            this.grid = app.el("path", {class: "grid"});
            this.cursor = app.el("path", {class: "cursor"});
            this.labels = Array.from({length: 5}, () => app.el("text", {class: "tick"}, ""));
            this.svg.append(this.grid, ...this.lines.flatMap((pair) => [pair.raw, pair.mean]),
                ...this.measured.map((one) => one.line), this.cursor, ...this.labels);
            node.replaceChildren(this.svg);
            this.node = node;
            new ResizeObserver(() => this.draw()).observe(node);
            this.svg.addEventListener("pointermove", (event) => this.point(event));
            this.svg.addEventListener("pointerleave", () => this.point(null));
        }

        /** One or two lists of {step, loss}, the second laid over the first; measurements of the first are shown. */
        set(...series) {
            this.series = series.map((points) => ({
                points: thin(points.filter((point) => !point.kind && point.loss !== null)),
                measured: points.filter((point) => point.kind === "validation"),
                mean: null,
            }));
            this.series.forEach((one) => (one.mean = average(one.points)));
            this.draw();
        }

        draw() {
            const width = this.node.clientWidth;
            const all = this.series.flatMap((one) => one.points);
            if (!width) return;
            this.svg.setAttribute("width", width);
            const steps = all.map((point) => point.step);
            const first = Math.min(0, ...steps);
            const last = Math.max(1, ...steps);
            const [low, high] = span(this.series);
            this.x = (step) => MARGIN.left + ((step - first) / (last - first)) * (width - MARGIN.left - MARGIN.right);
            this.y = (loss) => MARGIN.top + (1 - (Math.min(loss, high) - low) / (high - low)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
            const right = width - MARGIN.right;
            const rows = all.length ? [low, (low + high) / 2, high] : [];
            if (!rows.length) [0, 1, 2].forEach((index) => this.label(index, 0, 0, "", "end"));
            this.grid.setAttribute("d", rows.map((loss) => `M${MARGIN.left} ${this.y(loss)}H${right}`).join(""));
            rows.forEach((loss, index) => this.label(index, MARGIN.left - 6, this.y(loss) + 4, app.loss(loss), "end"));
            this.label(3, MARGIN.left, HEIGHT - 5, all.length ? app.t("step {n}", {n: first}) : "", "start");
            this.label(4, right, HEIGHT - 5, all.length ? app.t("step {n}", {n: last}) : "", "end");
            this.lines.forEach((pair, index) => {
                const one = this.series[index];
                pair.raw.setAttribute("d", one ? this.path(one.points, one.points.map((point) => point.loss)) : "");
                pair.mean.setAttribute("d", one ? this.path(one.points, one.mean) : "");
            });
            const measured = this.series.length ? this.series[0].measured : [];
            this.measured.forEach(({name, line}) => line.setAttribute("d", this.dotted(measured, measured.map((one) => one[name]))));
        }

        label(index, x, y, text, anchor) {
            const node = this.labels[index];
            node.setAttribute("x", x);
            node.setAttribute("y", y);
            node.setAttribute("text-anchor", anchor);
            app.setText(node, text);
        }

        path(points, values) {
            return points.map((point, index) => `${index ? "L" : "M"}${this.x(point.step).toFixed(1)} ${this.y(values[index]).toFixed(1)}`).join("");
        }

        /** A line with a dot at each of its points. */
        dotted(points, values) {
            const dot = (point, index) => `M${this.x(point.step).toFixed(1)} ${this.y(values[index]).toFixed(1)}m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0`;
            return this.path(points, values) + points.map(dot).join("");
        }

        point(event) {
            const one = this.series[0];
            if (!event || !one || !one.points.length) {
                this.cursor.setAttribute("d", "");
                app.setText(this.reading, "");
                return;
            }
            const x = event.clientX - this.svg.getBoundingClientRect().left;
            const nearest = one.points.reduce((best, point, index) =>
                Math.abs(this.x(point.step) - x) < Math.abs(this.x(one.points[best].step) - x) ? index : best, 0);
            const {step, loss} = one.points[nearest];
            this.cursor.setAttribute("d", `M${this.x(step)} ${MARGIN.top}V${HEIGHT - MARGIN.bottom}`);
            const before = one.measured.filter((each) => each.step <= step).pop();
            const held = before && app.t("held out {validation}, trained {training} (step {step})", {
                validation: app.loss(before.validation), training: app.loss(before.training), step: before.step,
            });
            const said = app.t("step {step}: {loss}, average {mean}", {step, loss: app.loss(loss), mean: app.loss(one.mean[nearest])});
            app.setText(this.reading, held ? `${said} · ${held}` : said);
        }
    };

    /** Exponential average over about a tenth of what there is, without the bias of its beginning. */
    function average(points) {
        const keep = 1 - 1 / Math.max(5, Math.min(100, points.length / 10));
        let sum = 0;
        let weight = 0;
        return points.map(({loss}) => {
            sum = keep * sum + (1 - keep) * loss;
            weight = keep * weight + (1 - keep);
            return sum / weight;
        });
    }

    /** From lowest to highest, without the few highest: one outlier must not flatten the rest. */
    function span(series) {
        const values = series.flatMap((one) => [...one.points.map((point) => point.loss)]).sort((a, b) => a - b);
        if (!values.length) return [0, 1];
        const measured = series.slice(0, 1).flatMap((one) => one.measured.flatMap((each) => [each.validation, each.training]));
        const low = Math.min(values[0], ...measured);
        const high = Math.max(values[Math.floor((values.length - 1) * 0.98)], ...series.flatMap((one) => one.mean.slice(-1)), ...measured.slice(-2));
        return high > low ? [low, high] : [low * 0.9, low * 1.1 || 1];
    }

    function thin(points) {
        const every = Math.ceil(points.length / MAX_POINTS);
        return every > 1 ? points.filter((point, index) => index % every === 0 || index === points.length - 1) : points;
    }
})(loraTrainer);
