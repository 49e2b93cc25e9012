// Cropping the picture in hand: by dragging over it, or with the arrow keys.
(function(app) {
    "use strict";

    const SMALLEST = 0.05;
    const FIRST = [0.1, 0.1, 0.9, 0.9]; // where the keys begin on a picture that is not cropped yet
    const KEY_STEPS = [0.01, 0.05]; // shares that a key moves; the second with Ctrl
    const editor = app.editor;
    // rectangle: being chosen, [left, top, right, bottom] as shares
    const crop = (editor.crop = {rectangle: null});
    let active = false;
    let corner = null; // where the dragging began

    crop.begin = function() {
        const canvas = app.get("editor_canvas");
        canvas.addEventListener("pointerdown", dragBegins);
        canvas.addEventListener("pointermove", dragMoves);
        canvas.addEventListener("pointerup", () => editor.act(dragEnds));
        canvas.addEventListener("keydown", onKey);
    };

    crop.toggle = function() {
        if (active) return crop.end();
        active = true;
        app.get("editor_crop").setAttribute("aria-pressed", "true");
        const canvas = app.get("editor_canvas");
        canvas.dataset.cropping = "true";
        canvas.focus({preventScroll: true});
        editor.say(app.t("Drag over the part that should stay, or use the arrow keys: alone they move it, with Shift they change its size. Enter crops; Escape ends it."));
    };

    crop.end = function() {
        if (!active) return;
        active = false;
        corner = null;
        crop.rectangle = null;
        const canvas = app.get("editor_canvas");
        if (document.activeElement === canvas) app.get("editor_crop").focus({preventScroll: true});
        app.get("editor_crop").setAttribute("aria-pressed", "false");
        delete canvas.dataset.cropping;
        editor.say("");
        editor.picture.draw();
    };

    const within = (value) => Math.min(1, Math.max(0, value));
    const share = function(event) {
        const box = app.get("editor_canvas").getBoundingClientRect();
        return [within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height)];
    };

    function dragBegins(event) {
        if (!active) return;
        event.preventDefault();
        event.target.setPointerCapture(event.pointerId);
        corner = share(event);
    }

    function dragMoves(event) {
        if (!corner) return;
        const [x, y] = share(event);
        crop.rectangle = [Math.min(x, corner[0]), Math.min(y, corner[1]), Math.max(x, corner[0]), Math.max(y, corner[1])];
        editor.picture.draw();
    }

    async function dragEnds() {
        if (!corner) return;
        corner = null;
        const wish = crop.rectangle;
        if (wish && wish[2] - wish[0] > SMALLEST && wish[3] - wish[1] > SMALLEST) await editor.picture.change({crop: wish});
    }

    const DIRECTIONS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, -1], ArrowDown: [1, 1]};

    function onKey(event) {
        if (!active) return;
        if (event.key in DIRECTIONS) step(...DIRECTIONS[event.key], event.shiftKey, KEY_STEPS[Number(event.ctrlKey)]);
        else if (event.key === "Enter" && crop.rectangle) editor.picture.change({crop: crop.rectangle});
        else if (event.key === "Escape") crop.end();
        else return;
        event.preventDefault();
        event.stopPropagation();
    }

    /** Move the rectangle along an axis (0 across, 1 down), or its right or lower edge. */
    function step(axis, sign, resize, size) {
        const next = [...(crop.rectangle || editor.row.crop || FIRST)];
        const [low, high] = [axis, axis + 2];
        if (resize) {
            next[high] = Math.min(1, Math.max(next[low] + 2 * SMALLEST, next[high] + sign * size));
        } else {
            const by = sign < 0 ? -Math.min(size, next[low]) : Math.min(size, 1 - next[high]);
            next[low] += by;
            next[high] += by;
        }
        crop.rectangle = next.map((value) => Number(within(value).toFixed(4)));
        const [left, top, right, bottom] = crop.rectangle.map((value) => Math.round(100 * value));
        editor.say(app.t("From left {left} % to {right} %, from top {top} % to {bottom} %. Enter crops.", {left, right, top, bottom}));
        editor.picture.draw();
    }
})(loraTrainer);
