// Lines over the steps of runs: axes, a cursor that the pointer or the arrow keys move, and marks on the time line.
// Drawn as SVG of our own, in the host's colors: what a chart library would add is not needed here, and its canvas would
// know neither the theme nor a screen reader. Lines change in place; no node comes or goes while a curve grows.
(function(app) {
    "use strict";

    const HEIGHT = 220;
    const MARGIN = {left: 54, right: 12, top: 10, bottom: 22};
    const ROWS = 5;
    const COLUMNS = 6;
    const OUTLIERS = 0.02; // so many of the highest values of each step may lie above the picture
    const DEEPEST = 1e-6; // on a logarithmic scale, the lowest value that is shown as a share of the highest

    /** A picture of lines in node. say(step) gives the values at a step in words, which go into reading. */
    app.Plot = class {
        constructor(node, reading, say) {
            Object.assign(this, {node, reading, say, lines: [], log: false, at: null, paths: []});
            this.grid = app.el("path", {class: "grid"});
            this.cursor = app.el("path", {class: "cursor"});
            this.layer = app.el("g");
            this.rows = Array.from({length: ROWS + 2}, () => app.el("text", {class: "tick", "text-anchor": "end"}, ""));
            this.columns = Array.from({length: COLUMNS + 2}, () => app.el("text", {class: "tick", "text-anchor": "middle"}, ""));
            this.svg = app.el("svg", {class: "plot", role: "img", height: HEIGHT}, this.grid, this.layer, this.cursor, ...this.rows, ...this.columns);
            this.frame = app.el("div", {
                class: "plot_frame", role: "slider", tabindex: 0, "aria-label": app.t("Values at a step; the arrow keys move"),
                onkeydown: (event) => this.key(event), onblur: () => this.look(null),
            }, this.svg);
            node.replaceChildren(this.frame);
            new ResizeObserver(() => this.draw()).observe(node);
            this.svg.addEventListener("pointermove", (event) => this.point(event));
            this.svg.addEventListener("pointerleave", () => document.activeElement === this.frame || this.look(null));
        }

        /** lines: {kind, series, points: [[step, value], …], dots}; kind is its class, series the number of its run. */
        set(title, lines, log) {
            Object.assign(this, {lines, log});
            this.svg.setAttribute("aria-label", title);
            while (this.paths.length < lines.length) {
                this.paths.push(app.el("path"));
                this.layer.append(this.paths[this.paths.length - 1]);
            }
            this.draw();
        }

        draw() {
            const width = this.node.clientWidth;
            if (!width) return;
            this.svg.setAttribute("width", width);
            const steps = this.lines.flatMap((line) => [...line.points.slice(0, 1), ...line.points.slice(-1)]).map(([step]) => step);
            Object.assign(this, {first: Math.min(0, ...steps), last: Math.max(1, ...steps)});
            const scale = this.log ? Math.log10 : (value) => value;
            const [low, high] = span(this.lines, this.log);
            const [bottom, top] = [scale(low), scale(high)];
            const right = width - MARGIN.right;
            this.x = (step) => MARGIN.left + ((step - this.first) / (this.last - this.first)) * (right - MARGIN.left);
            this.y = (value) => MARGIN.top + (1 - (scale(Math.min(Math.max(value, low), high)) - bottom) / (top - bottom)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
            const rows = steps.length ? (this.log ? decades(low, high) : ticks(low, high, ROWS)) : [];
            const columns = steps.length ? ticks(this.first, this.last, COLUMNS).filter((step) => Number.isInteger(step)) : [];
            this.grid.setAttribute("d", rows.map((value) => `M${MARGIN.left} ${this.y(value).toFixed(1)}H${right}`).join(""));
            this.rows.forEach((node, index) => place(node, rows[index], MARGIN.left - 6, (value) => this.y(value) + 4, app.short));
            this.columns.forEach((node, index) => place(node, columns[index], this.x, () => HEIGHT - 5, String));
            this.paths.forEach((node, index) => {
                const line = this.lines[index];
                node.setAttribute("class", line ? `lora_trainer_${line.kind.split(" ").join(" lora_trainer_")} lora_trainer_series${line.series}` : "");
                node.setAttribute("d", line ? this.path(line) : "");
            });
            Object.entries({valuemin: this.first, valuemax: this.last}).forEach(([name, value]) => this.frame.setAttribute("aria-" + name, value));
            this.look(this.at);
            if (this.onDrawn) this.onDrawn();
        }

        path(line) {
            const shown = this.log ? line.points.filter(([, value]) => value > 0) : line.points;
            const places = shown.map(([step, value]) => `${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`);
            const dots = line.dots ? places.map((one) => `M${one}m-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0`) : [];
            return (places.length ? "M" + places.join("L") : "") + dots.join("");
        }

        point(event) {
            const x = event.clientX - this.svg.getBoundingClientRect().left;
            if (this.x) this.look(this.first + ((x - MARGIN.left) / (this.node.clientWidth - MARGIN.right - MARGIN.left)) * (this.last - this.first));
        }

        /** Arrow keys walk through the steps that are drawn, ten at once with Page Up and Page Down. */
        key(event) {
            const by = {ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity}[event.key];
            if (event.key === "Escape") this.look(null);
            const steps = [...new Set(this.lines.flatMap((line) => line.points.map(([step]) => step)))].sort((one, other) => one - other);
            if (!by || !steps.length) return;
            event.preventDefault();
            const now = this.at === null ? (by < 0 ? steps.length : -1) : steps.indexOf(this.at);
            this.look(steps[Math.max(0, Math.min(steps.length - 1, now + by))]);
        }

        /** Show the values at the drawn step nearest to this one; null for none. */
        look(step) {
            const near = step === null ? [] : this.lines.map((line) => app.nearest(line.points, step)).filter(Boolean).map(([one]) => one);
            const at = (this.at = near.length ? near.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best)) : null);
            this.cursor.setAttribute("d", at === null ? "" : `M${this.x(at).toFixed(1)} ${MARGIN.top}V${HEIGHT - MARGIN.bottom}`);
            const said = at === null ? "" : this.say(at);
            app.setText(this.reading, said);
            this.frame.setAttribute("aria-valuenow", at === null ? this.last || 0 : at);
            this.frame.setAttribute("aria-valuetext", said || app.t("no step is chosen"));
        }
    };

    /** The point of this step, or the one nearest to it; points are ordered by step. */
    app.nearest = function(points, step) {
        let [low, high] = [0, points.length - 1];
        while (high - low > 1) {
            const middle = (low + high) >> 1;
            if (points[middle][0] < step) low = middle;
            else high = middle;
        }
        return points.length ? (step - points[low][0] < points[high][0] - step ? points[low] : points[high]) : null;
    };

    /** A number on an axis. */
    app.short = function(value) {
        if (value === 0) return "0";
        const size = Math.abs(value);
        return size < 1e-3 || size >= 1e5 ? value.toExponential(0).replace("+", "") : String(Number(value.toPrecision(3)));
    };

    function place(node, value, x, y, text) {
        const there = value !== undefined;
        if (there) {
            node.setAttribute("x", typeof x === "function" ? x(value) : x);
            node.setAttribute("y", y(value));
        }
        app.setText(node, there ? text(value) : "");
    }

    /** Round numbers from low to high, about as many as are wanted. */
    function ticks(low, high, wanted) {
        const raw = (high - low) / wanted;
        const power = 10 ** Math.floor(Math.log10(raw));
        const step = [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
        const found = [];
        const from = Math.ceil(low / step - 1e-9);
        for (let index = 0; index <= 2 * wanted && (from + index) * step <= high + step * 1e-9; index++) found.push((from + index) * step);
        return found;
    }

    /** Powers of ten, between them 2 and 5 where there is room; round numbers where that gives too few. */
    function decades(low, high) {
        const count = Math.log10(high / low);
        const every = Math.ceil(count / ROWS);
        const factors = count > 2 ? [1] : [1, 2, 5];
        const found = [];
        for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
            if (power % every === 0) found.push(...factors.map((factor) => factor * 10 ** power));
        }
        const inside = found.filter((value) => value >= low && value <= high).slice(0, ROWS + 2);
        return inside.length > 2 ? inside : ticks(low, high, ROWS);
    }

    /** From lowest to highest, without the few highest of each step: one outlier must not flatten the rest. */
    function span(lines, log) {
        let [low, high] = [Infinity, -Infinity];
        for (const line of lines) {
            const values = line.points.map(([, value]) => value).filter((value) => !log || value > 0).sort((one, other) => one - other);
            if (!values.length) continue;
            low = Math.min(low, values[0]);
            high = Math.max(high, values[Math.ceil((values.length - 1) * (line.kind === "raw" ? 1 - OUTLIERS : 1))]);
        }
        if (low > high) return log ? [0.1, 1] : [0, 1];
        if (log) low = Math.max(low, high * DEEPEST);
        if (high > low) return [low, high];
        return log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
    }
})(loraTrainer);
