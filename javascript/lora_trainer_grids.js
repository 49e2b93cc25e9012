// Grids of a run: saved steps by weights by prompts, the base model first; of a LoRA that goes both ways a strip of
// weights, with the base model in its middle. A click on a picture puts that step at that weight into the Lora tab.
(function(app) {
    "use strict";

    const PACE = 1000; // ms between two looks while one is drawn
    /** Of a card, where nobody chose another. */
    app.usualWeight = (job) => (app.ways.isChange(job.task) ? 1 : 0.8);
    const SIZES = {min: 64, max: 640, usual: 160}; // of a picture, in pixels

    /** Lives in node. take({step, weight}) puts these into the Lora tab; loaded() is called with the first answer. */
    app.Grids = class {
        constructor(job, take, loaded) {
            Object.assign(this, {job, take, loaded, state: null, there: {}, taking: null, folder: null, step: null, timer: null});
            const field = (text, node, hint) => app.el("label", {class: "grid_field", title: hint}, app.el("span", {}, text), node);
            this.weights = app.el("input", {type: "text", spellcheck: "false"});
            this.steps = app.el("input", {type: "text", spellcheck: "false", placeholder: app.t("all saved steps")});
            this.prompts = app.el("textarea", {rows: 2, spellcheck: "false"});
            this.drawing = app.button(app.ways.isChange(job.task) ? "Draw a strip" : "Draw a grid", () => this.draw(), "primary");
            this.stopping = app.button("Stop drawing", () => this.ask("/stop"));
            this.status = app.el("span", {class: "status", role: "status"});
            this.problem = app.el("p", {class: "problem", role: "alert", hidden: true});
            this.view = app.el("div", {class: "grid_view"});
            this.shown = 0;
            this.node = app.el("section", {class: "grids", "aria-label": app.t("Grids")},
                app.el("div", {class: "grid_form"},
                    field(app.t("Weights"), this.weights, app.t("How strongly the LoRA is applied; a row for each")),
                    field(app.t("Steps"), this.steps, app.t("A column for each; eight where more were saved")),
                    field(app.t("Prompts, one a line"), this.prompts)),
                app.el("div", {class: "row"}, this.drawing, this.stopping, this.status), this.problem, this.view);
            this.look();
        }

        look() {
            clearTimeout(this.timer);
            const turn = this.shown; // what was asked for before something else was shown may be older than that
            return app.fetchJson(`/jobs/${this.job.id}/compare`).then(
                (state) => turn === this.shown && this.show(state), (error) => app.complain(error, this.problem));
        }

        /** With what the form says: every saved step at the usual weights, where nothing is changed. */
        async draw() {
            if (!this.state) await this.look();
            const numbers = (node, sentence, field) => {
                const parts = node.value.split(/[,，、\s]+/).filter(Boolean);
                const all = parts.map(Number);
                if (all.some((one) => !isFinite(one))) throw new app.ServerError(0, {message: sentence, field});
                return all.length ? all : null;
            };
            await this.ask("", () => ({
                weights: numbers(this.weights, app.t("Weights are numbers such as 0.5, 0.8 and 1."), "weights"),
                steps: numbers(this.steps, app.t("Steps are numbers such as 200 and 400."), "steps"),
                prompts: this.prompts.value.split("\n").map((line) => line.trim()).filter(Boolean),
            }));
        }

        async ask(command, wish) {
            app.show(this.problem, false);
            try {
                const state = await app.post(`/jobs/${this.job.id}/compare${command}`, wish && wish());
                if (!command) this.folder = null; // the newest
                this.show(state);
            } catch (error) {
                app.complain(error, this.problem);
            }
        }

        show(state) {
            this.shown++;
            const first = !this.state;
            this.state = state;
            if (first) {
                this.weights.value = state.weights.join(", ");
                this.prompts.value = state.prompts.join("\n");
                this.loaded();
            }
            const active = state.status === "waiting" || state.status === "running";
            this.drawing.disabled = active || !state.steps.length;
            app.show(this.stopping, active);
            app.setText(this.status, this.words(state));
            if (state.status === "failed" && state.error) app.complain({problems: [state.error]}, this.problem);
            this.build();
            if (active) this.timer = setTimeout(() => (this.node.isConnected || first) && this.look(), PACE);
        }

        words({status, done, total, waits_for: waits}) {
            if (status === "waiting") return waits ? app.t("Waits until the training of {name} is over.", {name: waits}) : app.t("Waits for its turn.");
            if (status === "running") return app.t("Drawing the pictures: {done} of {total}", {done, total});
            return status === "cancelled" ? app.t("Stopped; what was drawn up to then stays.") : "";
        }

        /** The step and weight that the Lora tab has. */
        isThere(step, weight) {
            this.there = {step, weight: weight || app.usualWeight(this.job)};
            this.build();
        }

        /** The table and what belongs to it; only where something of it is new. */
        build() {
            const all = this.state ? this.state.comparisons : [];
            const grid = all.find((one) => one.folder === this.folder) || all[0];
            const key = JSON.stringify([grid, all.length, this.there, this.taking]);
            if (!grid || key === this.view.dataset.key) return;
            this.view.dataset.key = key;
            const address = (file) => app.fileUrl(this.job.id, `${grid.folder}/${file}`);
            const earlier = app.el("select", {"aria-label": app.t("Grid that is shown")}, ...all.map((one, index) =>
                app.el("option", {value: one.folder, selected: one === grid}, app.t("grid {n}", {n: all.length - index}))));
            earlier.addEventListener("change", () => {
                Object.assign(this, {folder: earlier.value, step: null});
                this.build();
            });
            const place = grid.steps.indexOf(this.step) + 1;
            const slider = (label, attributes, act) => app.el("label", {class: "grid_slider"}, app.el("span", {}, label),
                app.el("input", {type: "range", "aria-label": label, ...attributes, oninput: (event) => act(Number(event.target.value))}));
            const reading = app.el("span", {class: "help"});
            const table = this.table(grid, address);
            const size = (pixels) => {
                this.size = pixels;
                table.style.setProperty("--lora-trainer-cell", pixels + "px");
            };
            const choose = (index) => {
                this.step = index ? grid.steps[index - 1] : null;
                app.setText(reading, index ? app.t("step {n}", {n: this.step}) : app.t("all steps"));
                for (const cell of table.querySelectorAll("[data-step]")) app.show(cell, !index || Number(cell.dataset.step) === this.step);
            };
            size(this.size || SIZES.usual);
            choose(place);
            this.view.replaceChildren(
                app.el("div", {class: "row"},
                    slider(app.t("Size"), {min: SIZES.min, max: SIZES.max, step: 16, value: this.size}, size),
                    slider(app.t("Step"), {min: 0, max: grid.steps.length, step: 1, value: place}, choose), reading,
                    all.length > 1 ? earlier : null,
                    app.el("a", {href: address(grid.grid), download: `${grid.name}-grid.png`}, app.t("Save as one picture"))),
                app.el("div", {class: "grid_scroll"}, table));
        }

        table(grid, address) {
            const files = new Map(grid.cells.map((cell) => [`${cell.prompt} ${cell.step} ${cell.weight}`, cell.file]));
            const picture = (key) => (files.has(key)
                ? app.el("img", {src: address(files.get(key)), alt: "", loading: "lazy"})
                : app.el("span", {class: "nothing_drawn"}, app.t("no picture")));
            const cell = (prompt, step, weight) => {
                const node = app.el("td", {"data-step": step});
                const is = (one) => one && one.step === step && one.weight === weight;
                const said = is(this.taking) ? app.t("on its way to your Lora tab …") : is(this.there) ? app.t("in your Lora tab") : "";
                const button = app.el("button", {
                    type: "button", class: "grid_cell", "aria-pressed": String(Boolean(is(this.there))),
                    title: app.t("Put step {step} at weight {weight} into your Lora tab", {step, weight}),
                    onclick: () => this.takeNow({step, weight}),
                }, picture(`${prompt} ${step} ${weight}`), said ? app.el("span", {class: "help"}, said) : null);
                button.disabled = Boolean(this.taking) || !this.state.steps.includes(step);
                node.append(button);
                return node;
            };
            if (grid.weights.some((weight) => weight < 0)) return this.strip(grid, cell, picture);
            const head = app.el("tr", {}, app.el("th"), app.el("th", {scope: "col"}, app.t("base model")),
                ...grid.steps.map((step) => app.el("th", {scope: "col", "data-step": step}, app.t("step {n}", {n: step}))));
            const rows = grid.prompts.flatMap((prompt, index) => [
                app.el("tr", {}, app.el("th", {class: "grid_prompt", colspan: grid.steps.length + 2, scope: "colgroup"}, prompt.text)),
                ...grid.weights.map((weight) => app.el("tr", {}, app.el("th", {scope: "row"}, `× ${weight}`),
                    app.el("td", {}, picture(`${index} null null`)), ...grid.steps.map((step) => cell(index, step, weight)))),
            ]);
            return app.el("table", {class: "grid_table"}, app.el("thead", {}, head), app.el("tbody", {}, ...rows));
        }

        /** From the lowest to the highest weight; a row for each step. */
        strip(grid, cell, picture) {
            const weights = [...grid.weights, null].sort((one, other) => one - other); // null, the base model, is 0
            const head = app.el("tr", {}, app.el("th"), ...weights.map((weight) =>
                app.el("th", {scope: "col"}, weight === null ? app.t("× 0, base model") : `× ${weight}`)));
            const rows = grid.prompts.flatMap((prompt, index) => [
                app.el("tr", {}, app.el("th", {class: "grid_prompt", colspan: weights.length + 1, scope: "colgroup"}, prompt.text)),
                ...grid.steps.map((step) => app.el("tr", {"data-step": step}, app.el("th", {scope: "row"}, app.t("step {n}", {n: step})),
                    ...weights.map((weight) => (weight === null ? app.el("td", {}, picture(`${index} null null`)) : cell(index, step, weight))))),
            ]);
            return app.el("table", {class: "grid_table"}, app.el("thead", {}, head), app.el("tbody", {}, ...rows));
        }

        async takeNow(choice) {
            this.taking = choice;
            this.build();
            try {
                await this.take(choice);
            } finally {
                this.taking = null;
                this.build();
            }
        }
    };
})(loraTrainer);
