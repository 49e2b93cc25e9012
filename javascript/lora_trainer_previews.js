// Previews: the same prompts and noise at every saved step; a slider walks through the steps, or all are shown beside
// each other, to take the best one.
(function(app) {
    "use strict";

    /** A strip in node; reading is where the shown step is written. take({step, weight}) puts what was saved then into
     * the Lora tab; weight may be left out. */
    app.Previews = class {
        constructor(node, reading, take) {
            Object.assign(this, {node, reading, take, comparing: false, taking: null});
            this.clear();
        }

        clear() {
            this.steps = new Map(); // step -> prompt -> address
            this.files = new Map(); // path of a LoRA -> step that it was saved at last: the best one has one file
            this.saved = new Set(); // steps of which there is a LoRA
            this.there = this.weight = null; // the step that the Lora tab has, and at which weight
            this.grids = null;
            this.chosen = null; // null follows the newest
            this.prompts = [];
            this.explain(app.t("The first picture is drawn before the first step."));
        }

        /** What stands there as long as there is no picture. */
        explain(sentence) {
            this.sentence = sentence;
            this.build();
        }

        /** Events of a job; those that are no previews are passed over. */
        add(events) {
            const savedBefore = this.saved;
            const news = events.filter((event) => event.kind === "preview" && event.data.path);
            for (const {kind, data} of events) if (kind === "saved" && data.kind === "lora") this.files.set(data.path, data.step);
            this.saved = new Set(this.files.values());
            for (const {job_id: job, data, text} of news) {
                if (!this.steps.has(data.step)) this.steps.set(data.step, new Map());
                this.steps.get(data.step).set(text, app.fileUrl(job, data.path));
                if (!this.prompts.includes(text)) this.prompts.push(text);
            }
            if (news.length || (this.comparing && String([...this.saved]) !== String([...savedBefore]))) this.build();
        }

        /** Show all steps of the job beside each other, with its grids, or one step at a time. */
        compare(comparing, job) {
            this.comparing = comparing;
            if (comparing && !this.grids) {
                this.grids = new app.Grids(job, this.take, () => this.comparing && this.build());
                this.grids.isThere(this.there, this.weight);
            }
            this.node.closest(".lora_trainer_panels").toggleAttribute("data-comparing", comparing);
            this.build();
        }

        /** The step that the Lora tab has, null for none, and the weight that was chosen for it, if any. */
        isThere(step, weight) {
            if (this.there === step && this.weight === weight) return;
            Object.assign(this, {there: step, weight});
            if (this.grids) this.grids.isThere(step, weight);
            if (this.comparing) this.build();
        }

        /** Show one step, also out of the comparison. */
        show(step) {
            if (this.comparing) this.compare(false);
            this.choose(step);
        }

        build() {
            const inOrder = (steps) => [...new Set(steps)].sort((one, other) => one - other);
            if (this.onSteps) this.onSteps(inOrder(this.steps.keys()).map((step) => ({step, address: this.steps.get(step).get(this.prompts[0])})));
            const worthComparing = inOrder([...this.steps.keys(), ...this.saved]);
            if (this.comparing && worthComparing.length) return this.buildComparison(worthComparing);
            const order = (this.order = inOrder(this.steps.keys()));
            if (!order.length) {
                this.node.replaceChildren(app.el("p", {class: "lead"}, this.sentence));
                app.setText(this.reading, "");
                return;
            }
            const first = this.prompts[0];
            this.pictures = this.prompts.map((prompt) => app.el("img", {alt: prompt, title: prompt}));
            this.thumbnails = order.map((step) => {
                const address = this.steps.get(step).get(first);
                const caption = step ? app.t("step {n}", {n: step}) : app.t("before");
                return app.el("button", {type: "button", class: "thumbnail", onclick: () => this.choose(step), title: caption},
                    address ? app.el("img", {src: address, alt: "", loading: "lazy"}) : null, app.el("span", {}, caption));
            });
            this.slider = app.el("input", {
                type: "range", min: 0, max: order.length - 1, step: 1, "aria-label": app.t("Step of the previews"),
                oninput: () => this.choose(order[Number(this.slider.value)]),
            });
            const focused = this.node.contains(document.activeElement) && document.activeElement.type === "range";
            this.node.replaceChildren(
                app.el("div", {class: "large"}, ...this.pictures),
                order.length > 1 ? this.slider : "",
                app.el("div", {class: "filmstrip"}, ...this.thumbnails),
            );
            if (focused) this.slider.focus();
            this.display();
        }

        /** Also of what was saved without a picture: "Stop and save" draws none. */
        buildComparison(order) {
            const under = (step) => {
                if (step && step === this.there) return app.el("span", {class: "help"}, app.t("in your Lora tab"));
                if (step === this.taking) return app.el("span", {class: "help", role: "status"}, app.t("on its way to your Lora tab …"));
                const {state} = this.grids; // it knows which files are still there
                if (!this.saved.has(step) || (state && !state.steps.includes(step))) return false;
                const button = app.button("Use this one", () => this.takeNow(step));
                button.disabled = Boolean(this.taking); // one after the other: the last click counts
                return button;
            };
            const card = (step) => {
                const drawn = this.steps.get(step) || new Map();
                return app.el("figure", {class: "checkpoint"},
                    ...(drawn.size ? [] : [app.el("div", {class: "nothing_drawn"}, app.t("no picture"))]),
                    ...this.prompts.map((prompt) => drawn.has(prompt) && app.el("img", {src: drawn.get(prompt), alt: prompt, title: prompt})),
                    app.el("figcaption", {}, app.el("span", {}, step ? app.t("step {n}", {n: step}) : app.t("before")), under(step)));
            };
            const cards = app.el("div", {class: "checkpoints"}, ...order.map(card));
            if (this.grids.node.parentNode === this.node) this.node.firstChild.replaceWith(cards); // what is typed there stays
            else this.node.replaceChildren(cards, this.grids.node);
            app.setText(this.reading, "");
        }

        /** Put what was saved at this step into the Lora tab; that it is on its way is seen at once. */
        async takeNow(step) {
            this.taking = step;
            this.build();
            try {
                await this.take({step});
            } finally {
                this.taking = null;
                if (this.comparing) this.build();
            }
        }

        choose(step) {
            this.chosen = step === this.order[this.order.length - 1] ? null : step;
            this.display();
        }

        display() {
            const step = this.chosen === null ? this.order[this.order.length - 1] : this.chosen;
            const index = this.order.indexOf(step);
            this.slider.value = index;
            this.pictures.forEach((picture, number) => {
                const address = this.steps.get(step).get(this.prompts[number]);
                if (address && picture.getAttribute("src") !== address) picture.src = address;
            });
            this.thumbnails.forEach((button, number) => button.setAttribute("aria-pressed", String(number === index)));
            if (this.thumbnails[index].scrollIntoView && this.chosen === null) {
                const film = this.thumbnails[index].parentElement;
                film.scrollLeft = film.scrollWidth;
            }
            app.setText(this.reading, step ? app.t("step {n}", {n: step}) : app.t("before the training"));
        }
    };
})(loraTrainer);
