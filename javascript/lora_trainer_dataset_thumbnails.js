// The Dataset sub-tab's thumbnails: those near what is seen come in one answer and are shown together. A request for each
// costs a browser more than all the rest of a page of tiles.
(function(app) {
    "use strict";

    const KEPT = 300; // some MB
    const AGAIN_MS = 5000; // after an error
    const editor = app.editor;
    const thumbnails = (editor.thumbnails = {});
    const kept = new Map(); // picture by address, empty where it cannot be read; the one that came first is first
    const waiting = new Set(); // what comes into view, and has no picture yet
    const rows = new WeakMap(); // what a tile's image shows
    let watch = null;
    let asking = null;
    let resuming = null;

    /** Let a tile's image show this row's picture: now where it is known, else once it is near what is seen. */
    thumbnails.show = function(image, row) {
        const address = editor.gallery.url(row, "thumbnails");
        rows.set(image, row);
        if (image.dataset.address === address && seen(image)) return;
        image.dataset.address = address;
        waiting.delete(image);
        put(image, kept.get(address));
        watch = watch || new IntersectionObserver(near, {root: app.get("editor_grid"), rootMargin: "25% 0px"});
        watch.unobserve(image); // one that stays in view would not be told of again
        if (!kept.has(address)) watch.observe(image);
    };

    /** Nothing that is on its way is waited for. */
    thumbnails.forget = function() {
        if (asking) asking.abort();
        asking = null;
        waiting.clear();
        clearTimeout(resuming);
        if (watch) watch.disconnect();
    };

    /** Look again at the tiles that have no picture yet, after they were forgotten or could not be asked for. */
    thumbnails.resume = function() {
        clearTimeout(resuming);
        for (const image of app.get("editor_grid").querySelectorAll("img")) {
            if (!seen(image) && !kept.has(image.dataset.address)) watch.observe(image);
        }
    };

    const seen = (image) => image.style.visibility === "visible";

    /** Its place stays where there is none, so nothing else is laid out anew. */
    function put(image, picture) {
        if (picture) image.src = picture;
        image.style.visibility = picture ? "visible" : "hidden";
    }

    function near(entries) {
        entries.filter((entry) => entry.isIntersecting).forEach(({target}) => {
            watch.unobserve(target);
            waiting.add(target);
        });
        if (waiting.size && !asking && editor.state) ask(asking = new AbortController());
    }

    async function ask(mine) {
        const {id} = editor.state;
        try {
            while (waiting.size && asking === mine) {
                const wanted = Array.from(waiting, (image) => [image, rows.get(image).file, image.dataset.address]);
                // The server answers with what it has, and what it can make in a moment; the rest is asked for again.
                const {pictures} = await app.post(`/editor/${id}/thumbnails`, {files: wanted.map(([, file]) => file)}, mine.signal);
                if (asking !== mine) return;
                for (const [image, file, address] of wanted) {
                    if (!(file in pictures)) continue;
                    keep(address, pictures[file]);
                    if (image.dataset.address !== address) continue; // the tile shows another picture by now
                    put(image, pictures[file]);
                    waiting.delete(image);
                }
            }
        } catch (error) {
            if (asking !== mine) return;
            waiting.clear();
            clearTimeout(resuming);
            resuming = setTimeout(thumbnails.resume, AGAIN_MS);
        } finally {
            if (asking === mine) asking = null;
        }
    }

    function keep(address, picture) {
        kept.delete(address);
        kept.set(address, picture);
        if (kept.size > KEPT) kept.delete(kept.keys().next().value);
    }
})(loraTrainer);
