// Settings that go with another one until a person touches them: alpha with the rank, and others.
(function(app) {
    "use strict";

    const follow = (app.follow = {});

    /** The same ratio as before; what is empty stays empty, as the server fills it from the other one. */
    const inProportion = (own, before, now) =>
        (own > 0 && before > 0 && now > 0 ? Number((own * now / before).toPrecision(4)) : own);

    // Prodigy finds the rate itself and is given 1; any other optimizer would diverge with that.
    const rateOf = (own, before, now) =>
        (now === "prodigy" ? 1 : before === "prodigy" ? app.form.suggestion("learning_rate") : own);

    // By name: the setting that it follows, and its value from its own before, and the other's before and now.
    const RULES = {
        alpha: ["lora_rank", inProportion],
        conv_alpha: ["conv_rank", inProportion],
        learning_rate: ["optimizer", rateOf],
        text_encoder_lr: ["learning_rate", inProportion],
        train_text_encoder: ["text_encoder_lr", (own, before, now) => own || now > 0], // a rate means to train it
    };

    /** Whether an earlier run's or a file's value of it must be known, for what follows it or what it follows. */
    follow.concerns = (name) => name in RULES || Object.values(RULES).some(([leader]) => leader === name);

    /** The value of a setting that nobody touched. */
    follow.value = function(name) {
        const own = app.form.base(name);
        if (!(name in RULES)) return own;
        const [leader, rule] = RULES[name];
        const [before, now] = [app.form.base(leader), app.form.value(leader)];
        return before === now ? own : rule(own, before, now);
    };

    /** Say beside the fields which of them follow another one now. */
    follow.show = function() {
        for (const [name, [leader]] of Object.entries(RULES)) {
            const follows = !app.form.touched(name) && app.form.value(name) !== app.form.base(name);
            let place = app.get("follows_" + name);
            if (!place) {
                place = app.el("p", {class: "help", id: "follows_" + name});
                app.get("problem_" + name).before(place);
            }
            app.setText(place, follows ? app.t("Follows {name} until you change it.", {name: app.form.label(leader)}) : "");
            app.show(place, follows);
        }
    };
})(loraTrainer);
