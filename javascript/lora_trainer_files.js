// Files that a person gives, on their way to the server; and what the server says of them.
(function(app) {
    "use strict";

    const MAX_MB = 64; // of one picture, as the server accepts it

    app.dataUrl = (file) => new Promise((done, fail) => {
        const reader = new FileReader();
        reader.onload = () => done(reader.result);
        reader.onerror = () => fail(reader.error);
        reader.readAsDataURL(file);
    });

    /** In the server's words, which would refuse the whole request with all that comes along; null for a file that it
     * would take. */
    app.tooLarge = (file) => (file.size <= MAX_MB << 20 ? null : {
        message: `${file.name} has ${Math.floor(file.size / (1 << 20))} MB; up to ${MAX_MB} MB are accepted.`,
        remedy: "Make it smaller; training scales it down anyway.",
    });

    /** A path without the quotes in which Windows copies it. */
    app.unquoted = (text) => text.trim().replace(/^"(.*)"$/, "$1");

    /** Show warnings of the server in a list of the page. */
    app.hints = function(id, warnings) {
        const list = app.get(id);
        list.replaceChildren(...warnings.map((text) => app.el("li", {}, app.said(text))));
        app.show(list, warnings.length);
    };
})(loraTrainer);
