// The Dataset sub-tab's keys.
(function(app) {
    "use strict";

    const editor = app.editor;
    const keys = (editor.keys = {});

    keys.begin = () => document.addEventListener("keydown", onKey);

    const writes = (target) => target.closest && target.closest("textarea, select, input:not([type=checkbox])");

    function onKey(event) {
        if (!editor.state || !editor.visible() || event.altKey || event.defaultPrevented) return;
        const caption = event.target === app.get("editor_caption");
        const command = event.ctrlKey || event.metaKey;
        const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
        const done = () => {
            event.preventDefault();
            event.stopPropagation(); // the host has keys of its own
        };
        if (command && key === "s") {
            done();
            return void editor.save();
        }
        if (command && (key === "z" || key === "y")) {
            // While a text is being typed, its own undo comes first.
            if (writes(event.target) && !(caption && !editor.picture.touched())) return;
            done();
            return void editor.undo(key === "y" || event.shiftKey ? "redo" : "undo");
        }
        if (command || event.isComposing) return;
        if (caption) {
            if (key === "Enter" && !event.shiftKey) {
                done();
                editor.act(() => editor.picture.keep());
                editor.gallery.focus();
            } else if (key === "Escape") {
                done();
                editor.picture.putBack();
                editor.gallery.focus();
            }
            return;
        }
        if (writes(event.target)) return;
        if (key === "ArrowRight" || key === "ArrowLeft") {
            done();
            editor.act(() => editor.gallery.walk(key === "ArrowRight" ? 1 : -1));
        } else if (key === "Enter" && (!event.target.closest("button, summary, a") || event.target.closest("#lora_trainer_editor_grid"))) {
            done();
            editor.picture.edit();
        } else if (key === "Escape") {
            editor.crop.end();
        }
    }
})(loraTrainer);
