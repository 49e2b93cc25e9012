// How the number of steps comes about, so that a reader can do the sum.
(function(app) {
    "use strict";

    /** facts: what the estimate says. The steps themselves stand in the line below. */
    app.sum = function(facts) {
        if (app.ways.isChange(facts.task)) return ofChange(facts);
        const count = facts.task === "text" ? facts.rows - facts.held_out : facts.pictures;
        const words = facts.task === "text" ? ["1 row", "{n} rows"] : ["1 picture", "{n} pictures"];
        const pictures = app.t(words[count === 1 ? 0 : 1], {n: count});
        const repeats = app.t(facts.repeats === 1 ? "1 repeat" : "{n} repeats", {n: facts.repeats});
        const epochs = app.t(facts.epochs === 1 ? "1 epoch" : "{n} epochs", {n: facts.epochs});
        const even = count * facts.repeats === facts.visits_per_epoch;
        const seen = even ? `${pictures} × ${repeats}` : app.t("{pictures}, seen {n} times an epoch", {pictures, n: facts.visits_per_epoch});
        const batch = facts.batch_size * facts.accumulation;
        const {stops_at: limit} = facts;
        if (even && !limit && facts.visits_per_epoch * facts.epochs === facts.steps * batch) {
            const accumulated = facts.accumulation > 1 ? " " + app.t("({batch} × {n} accumulated)", {batch: facts.batch_size, n: facts.accumulation}) : "";
            return `${seen} × ${epochs} / ${app.t("batch {n}", {n: batch})}${accumulated}`;
        }
        // Batches hold pictures of one size, and the last one of each may not be full: only whole steps add up.
        const steps = app.t("{seen} = {n} steps an epoch", {seen, n: facts.steps_per_epoch});
        return limit ? app.t("{steps}; max_train_steps sets how many in all", {steps}) : `${steps} × ${epochs}`;
    };

    /** Of a change, whose steps are a number of their own. */
    function ofChange({task, pictures, batch_size: size, accumulation}) {
        const batch = app.t("batch {n}", {n: size * accumulation});
        if (task === "words") return `${app.t("words alone")} / ${batch}`;
        const pairs = pictures / 2;
        const seen = task === "slider" ? app.t("{n} pictures", {n: pictures}) : app.t(pairs === 1 ? "1 pair" : "{n} pairs", {n: pairs});
        return `${seen} / ${batch}`;
    }
})(loraTrainer);
