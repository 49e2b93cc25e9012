// The data sets that are kept here: a line each with a picture, to be opened, trained on, renamed and deleted.
(function(app) {
    "use strict";

    const sets = (app.sets = {});
    let asked = 0;
    const address = (name) => "/datasets/" + encodeURIComponent(name);

    /** The list anew; gently: not while somebody is at one of its lines. */
    sets.load = async function(gently = false) {
        const mine = ++asked;
        const {datasets} = await app.fetchJson("/datasets");
        if (mine !== asked) return; // a later question was answered first
        if (gently && app.get("sets").contains(document.activeElement)) return;
        app.get("sets").replaceChildren(...datasets.map(line));
        app.show(app.get("sets_empty"), !datasets.length);
    };

    function line(set) {
        const message = app.el("p", {class: "problem", role: "alert", hidden: true});
        const picture = set.cover
            ? app.el("img", {src: app.thumbnailUrl(set.name, set.cover), alt: "", loading: "lazy"})
            : app.el("span", {class: "no_picture", "aria-hidden": "true"});
        const title = app.el("span", {class: "name"}, set.name);
        const buttons = app.el("span", {class: "row"},
            set.pictures ? app.button("Train with them", () => train(set)) : null,
            app.button("Edit", () => app.editor.open(set.name)),
            set.own ? app.button("Rename", () => rename(set, title)) : null,
            set.own ? app.button("Delete …", () => askToDelete(set, message)) : null);
        const facts = [app.t(set.pictures === 1 ? "1 picture" : "{n} pictures", {n: set.pictures}), app.bytes(set.size), app.date(set.changed)];
        return app.el("li", {class: "set"}, picture,
            app.el("div", {class: "set_text"}, title, app.el("span", {class: "help"}, facts.join(" · "))),
            buttons, message);
    }

    async function train(set) {
        app.openSubTab("Train");
        await app.pictures.choose(set.name);
    }

    /** Something that changes the list, which then is fetched anew: here and in step 1. */
    async function change(set, message, action, now) {
        app.show(message, false);
        try {
            await action();
        } catch (error) {
            return app.complain(error, message);
        }
        // Step 1 first: nobody may start a training on pictures that the list does not show any more.
        const chosen = app.pictures.chosen === set.name ? app.pictures.choose(now) : null;
        await Promise.all([chosen, sets.load(), app.pictures.listEarlier()]);
    }

    function rename(set, title) {
        const field = app.el("input", {type: "text", value: set.name, "aria-label": app.t("New name")});
        const message = title.closest("li").querySelector("[role=alert]");
        const go = () => change(set, message, () => app.post(address(set.name) + "/rename", {name: field.value.trim()}), field.value.trim());
        const form = app.el("span", {class: "inline"}, field, app.button("Rename it", go, "primary"), app.button("Cancel", () => sets.load()));
        field.addEventListener("keydown", (event) => {
            if (event.key === "Enter") go();
            if (event.key === "Escape") form.replaceWith(title);
        });
        title.replaceWith(form);
        field.select();
    }

    /** Two clicks: the second is asked for, with what it takes away. */
    function askToDelete(set, message) {
        const loss = [app.t("This deletes {n} pictures with their captions, {size}, from the trainer's folder. The LoRAs made with them stay.", {n: set.pictures, size: app.bytes(set.size)})];
        if (set.resumable) loss.push(app.t("Unfinished trainings on them, which could not be resumed any more: {n}.", {n: set.resumable}));
        message.replaceChildren(loss.join(" ") + " ",
            app.button("Delete them", () => change(set, message, () => app.call("DELETE", address(set.name), {confirm: true}), null), "danger"), " ",
            app.button("Keep them", () => app.show(message, false)));
        app.show(message, true);
    }
})(loraTrainer);
