// Finding a setting in Advanced by its name, label or explanation, in English or in the page's language.
(function(app) {
    "use strict";

    const search = (app.search = {});
    let opened = null; // the groups that were open before the search

    search.begin = function() {
        const field = app.get("find");
        field.addEventListener("input", () => search.show(field.value));
        field.addEventListener("keydown", (event) => {
            if (event.key !== "Escape" || !field.value) return;
            field.value = "";
            search.show("");
        });
    };

    /** Show the settings in which all these words stand; all of them for none. */
    search.show = function(text) {
        const words = text.toLowerCase().split(/\s+/).filter(Boolean);
        const groups = [...app.get("advanced").querySelectorAll("[data-group]")];
        if (words.length && !opened) opened = new Set(groups.filter((group) => group.open));
        let count = 0;
        for (const group of groups) {
            const hits = [...group.querySelectorAll("[data-find]")].filter((field) => {
                const hit = !field.classList.contains("lora_trainer_other_task") && matches(field, words);
                app.show(field, hit);
                return hit;
            });
            count += hits.length;
            app.show(group, hits.length);
            group.open = words.length ? hits.length > 0 : opened ? opened.has(group) : group.open;
        }
        if (!words.length) opened = null;
        app.setText(app.get("found"), !words.length ? "" : count === 1 ? app.t("1 setting") : app.t("{n} settings", {n: count}));
    };

    function matches(field, words) {
        const english = field.dataset.find.split("\n");
        const all = [...english, english[0].replace(/_/g, " "), ...english.map((part) => app.t(part))].join("\n").toLowerCase();
        return words.every((word) => all.includes(word));
    }
})(loraTrainer);
