// The Train LoRA tab in the browser. Every file adds its part to this one object; nothing else becomes global.
// Words from the server reach the page as text (textContent), never as HTML.
var loraTrainer = window.loraTrainer || {};

(function(app) {
    "use strict";

    const PREFIX = "lora_trainer_";
    const API = (app.API = "./lora-trainer/v1"); // relative, so that a --subpath is kept

    /** The element of ours with this id (without the prefix), or null. */
    app.get = (id) => document.getElementById(PREFIX + id);

    const known = (words, text) => Object.prototype.hasOwnProperty.call(words, text);

    /** What the page says, in the host's language; {names} are filled in from values. */
    app.t = function(text, values) {
        const words = window.localization || {};
        const found = known(words, text) ? words[text] : text;
        return values ? found.replace(/\{(\w+)\}/g, (all, name) => (name in values ? String(values[name]) : all)) : found;
    };

    /** What the server says, in the host's language where that has it: its sentences are known with {0}, {1} for what
     * they name. What they name may be a sentence again; a person's words stay. Words.said does the same for reports. */
    app.said = function(text) {
        const words = window.localization || {};
        if (!text || known(words, text)) return text && words[text];
        if (saidIn !== words) {
            saidIn = words;
            patterns = Object.keys(words).filter((key) => key.includes("{0}")).sort((one, other) => fixed(other) - fixed(one))
                .map(pattern);
        }
        const sentences = text.replace(/([.!?]) (?=[A-Z])/g, "$1\n").split("\n");
        let across = null; // where a name would hold the end of a sentence: more likely these are several sentences
        for (const {longest, expression, translated} of patterns) {
            const found = text.includes(longest) && expression.exec(text);
            if (!found) continue;
            const filled = () => translated.replace(/\{(\d)\}/g, (all, index) => inner(found[Number(index) + 1]));
            if (!found.slice(1).some((part) => ACROSS.test(part))) return filled();
            across = across || filled;
        }
        const each = sentences.length > 1 ? sentences.map(app.said) : [];
        const joined = each.join(text.includes("\n") ? "\n" : " ");
        if (each.length && each.every((one, index) => one !== sentences[index])) return joined;
        return placed(text) || (across ? across() : joined || text);
    };
    /** A sentence behind the place that it is about, such as "metadata.csv, line 3: …"; empty for another text. */
    const placed = function(text) {
        const [, place, what] = /^(.*?): (.+)$/.exec(text) || [];
        const translated = what && !ACROSS.test(place) && app.said(what);
        return translated && translated !== what ? app.said(place) + app.t(": ") + translated : "";
    };
    /** A part of a sentence: a reason ("it is empty"), sentences, or the name of something, which stays. Of reasons that
     * begin otherwise those of three words and more are known: no name is likely to be one. */
    const inner = function(text) {
        const isReason = REASON.test(text) || (/ .+ /.test(text) && known(window.localization, text));
        return isReason ? app.said(text) : text.replace(/and \d+ more$/, (rest) => app.said(rest)); // the end of a list
    };
    const ACROSS = /[.!?] [A-Z]|\n/;
    const REASON = /^(its?|is|an?|the|there|in|quantized) |[.!?]$|\n/;
    let saidIn = null;
    let patterns = [];
    const pattern = function(key) {
        const pieces = key.split(/\{\d\}/);
        return {
            longest: pieces.reduce((one, other) => (other.length > one.length ? other : one)),
            // Lines are numbers: "{0}, line {1}" is a place, and what comes behind it is not.
            expression: new RegExp("^" + pieces.map(escaped).join("([^]*?)").replace(/\b([Ll]ine )\(.*?\)/g, "$1(\\d+)") + "$"),
            translated: window.localization[key],
        };
    };
    const fixed = (key) => key.replace(/\{\d\}/g, "").length;
    const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

    /** A new element. class and id get the prefix; on… are listeners; strings become text. */
    app.el = function(name, attributes, ...children) {
        const node = name === "svg" || name === "path" || name === "line" || name === "text" || name === "g"
            ? document.createElementNS("http://www.w3.org/2000/svg", name)
            : document.createElement(name);
        for (const [key, value] of Object.entries(attributes || {})) {
            if (value === null || value === undefined || value === false) continue;
            if (key === "class") node.setAttribute("class", classes(value));
            else if (key === "id") node.id = PREFIX + value;
            else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
            else node.setAttribute(key, value === true ? "" : value);
        }
        node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
        made.add(node);
        return node;
    };
    const classes = (names) => names.split(" ").map((one) => PREFIX + one).join(" ");
    const made = new WeakSet();

    /** Whether a node is of our page, also before it stands there. */
    app.isOurs = function(node) {
        for (let one = node; one; one = one.parentNode) {
            if (made.has(one) || (one.classList && one.classList.contains(PREFIX + "page"))) return true;
        }
        return false;
    };

    // The host replaces every text that equals a word of its localisation: also a person's, such as a job called
    // "Character". Our page translates its own words (app.t), so the host is told to leave it alone.
    for (const name of ["processNode", "processTextNode"]) {
        const theirs = window[name];
        if (typeof theirs === "function") window[name] = (node) => (app.isOurs(node) ? undefined : theirs(node));
    }

    const TIPS = {
        "Pause": "Waits after this step and leaves the graphics card to you; Resume goes on from here.",
        "Save now": "Saves the LoRA as it is after this step, and the state to go on from.",
        "Switch back": "Chooses again what was chosen when the training began, so that it goes on.",
        "Preview now": "Draws the preview prompts with the LoRA as it is now.",
        "Stop and save": "Ends after this step; the LoRA as it is comes into your Lora tab.",
        "Stop": "Ends after this step; only what was saved before stays, also in your Lora tab.",
        "Compare checkpoints": "Shows the pictures of all saved steps beside each other, to use the best one.",
        "Draw a grid": "Draws every saved step at several weights beside the base model, with the same noise.",
        "Draw a strip": "Draws the prompt at weights from -1 to 1 with the same noise; a click on a picture chooses its weight.",
        "Use this one": "Puts what was saved at this step into your Lora tab, instead of what is there; nothing is lost.",
        "Leave it": "It is not offered here any more; Runs keeps it, and can resume it.",
        "Continue from it": "A new training that begins with this LoRA, such as with more pictures.",
        "Run again with changes": "Puts its settings into the form; nothing starts yet.",
    };

    /** A button that does this; what goes wrong is said on the page that it stands on. */
    app.button = (text, action, kind) => app.el("button", {
        type: "button", class: "button " + (kind || "secondary"), title: TIPS[text] && app.t(TIPS[text]),
        onclick: (event) => app.attempt(action, event.currentTarget),
    }, app.t(text));

    /** A place to drop files on: give is called with the DataTransfer. */
    app.dropZone = function(node, give) {
        ["dragenter", "dragover"].forEach((kind) => node.addEventListener(kind, (event) => {
            event.preventDefault();
            event.stopPropagation(); // the host would take it for an image to read the prompt from
            node.classList.add("lora_trainer_over");
        }));
        node.addEventListener("dragleave", () => node.classList.remove("lora_trainer_over"));
        node.addEventListener("drop", (event) => {
            event.preventDefault();
            event.stopPropagation();
            node.classList.remove("lora_trainer_over");
            give(event.dataTransfer);
        });
    };

    app.attempt = function(action, node) {
        const run = node.closest("." + PREFIX + "inside");
        const place = run ? run.querySelector("[role=alert]") : node.closest("#lora_trainer_tab_dataset") && app.get("editor_problem");
        return Promise.resolve().then(action).catch((error) => (place ? app.complain(error, place) : app.live.complain(error)));
    };

    /** Change a text in place: no node comes or goes, so the host's own watchers of the page stay asleep. */
    app.setText = function(node, text) {
        if (!node) return;
        const only = node.childNodes.length === 1 ? node.firstChild : null;
        if (only && only.nodeType === Node.TEXT_NODE) {
            if (only.data !== text) only.data = text;
        } else {
            node.textContent = text;
        }
    };

    /** The children of a node, as many as wanted: those that are there stay, and make() gives further ones. */
    app.setCount = function(node, count, make) {
        const found = Array.from(node.children);
        found.slice(count).forEach((child) => child.remove());
        const more = Array.from({length: Math.max(0, count - found.length)}, make);
        if (more.length) node.append(...more);
        return [...found.slice(0, count), ...more];
    };

    /** A text in parts, [{text, class}]: what has no class is bare text. Changed in place where parts are alike. */
    app.setParts = function(node, parts) {
        const alike = node.childNodes.length === parts.length
            && parts.every((part, index) => (node.childNodes[index].nodeType === Node.ELEMENT_NODE) === Boolean(part.class));
        if (!alike) return node.replaceChildren(...parts.map((part) => (part.class ? app.el("span", {class: part.class}, part.text) : part.text)));
        parts.forEach((part, index) => {
            const child = node.childNodes[index];
            if (part.class) {
                child.className = classes(part.class);
                app.setText(child, part.text);
            } else if (child.data !== part.text) child.data = part.text;
        });
    };

    app.show = function(node, visible) {
        if (node && node.hidden === Boolean(visible)) node.hidden = !visible;
    };

    /** What the server refused: problems is a list of {message, field, remedy}. */
    app.ServerError = class extends Error {
        constructor(status, answer) {
            super(answer.message);
            this.status = status;
            this.problems = answer.problems && answer.problems.length ? answer.problems : [answer];
        }
    };

    /** Call our API: the answer as an object. Throws app.ServerError, also when the server is away. */
    app.call = async function(method, path, body, signal) {
        let response;
        try {
            response = await fetch(API + path, {
                method,
                signal,
                headers: body === undefined ? {} : {"Content-Type": "application/json"},
                body: body === undefined ? undefined : JSON.stringify(body),
            });
        } catch (error) {
            if (error.name === "AbortError") throw error;
            throw new app.ServerError(0, {message: app.t("The WebUI does not answer."), remedy: app.t("It may be restarting.")});
        }
        const answer = await response.json().catch((error) => {
            if (error.name === "AbortError") throw error;
            return null;
        });
        if (response.ok && answer !== null) return answer;
        throw new app.ServerError(response.status, {
            message: app.t("The WebUI answered with an error ({status}).", {status: response.status}),
            remedy: app.t("Its console has the details."),
            ...(answer && answer.message ? answer : {}),
        });
    };
    app.fetchJson = (path, signal) => app.call("GET", path, undefined, signal);
    app.post = (path, body, signal) => app.call("POST", path, body || {}, signal);

    /** The address of a job's file or a dataset's thumbnail. */
    app.fileUrl = (job, path) => `${API}/jobs/${job}/files/${path.split("/").map(encodeURIComponent).join("/")}`;
    /** The run as one page to keep or share, in the language of this one. */
    app.reportUrl = (job) => `${API}/jobs/${job}/report?language=${app.t("Loss") === "Loss" ? "en" : "zh_CN"}`;
    app.thumbnailUrl = (dataset, file) =>
        `${API}/datasets/${encodeURIComponent(dataset)}/thumbnails/${file.split("/").map(encodeURIComponent).join("/")}`;

    app.sentence = (problem) => [problem.message, problem.remedy].filter(Boolean).map(app.said).join(" ");
    /** What a run warns of, and its verdict, as sentences. */
    app.remarks = ({warnings, advice}) => [...warnings.map(app.sentence),
        ...(advice && !warnings.some((one) => one.message === advice) ? [app.said(advice)] : [])];

    app.named = (problem) => (problem.field ? problem.field + ": " : "") + app.sentence(problem);

    /** Show in one place what went wrong with an action. */
    app.complain = function(error, node) {
        if (error.name === "AbortError") return;
        const place = node || app.get("problem_");
        app.setText(place, app.reason(error));
        app.show(place, true);
    };

    /** What went wrong, in words. */
    app.reason = function(error) {
        if (error.problems) return error.problems.map(app.sentence).join(" ");
        console.error(error);
        return String(error);
    };

    // -- numbers for people

    app.duration = function(seconds) {
        if (seconds === null || seconds === undefined || !isFinite(seconds)) return "–";
        const whole = Math.max(0, Math.round(seconds));
        const pad = (number) => String(number).padStart(2, "0");
        const hours = Math.floor(whole / 3600);
        const minutes = Math.floor(whole / 60) % 60;
        return hours ? `${hours}:${pad(minutes)}:${pad(whole % 60)}` : `${minutes}:${pad(whole % 60)}`;
    };

    app.about = function(minutes) {
        if (minutes < 1) return app.t("less than a minute");
        if (minutes < 90) return app.t("about {n} min", {n: Math.round(minutes)});
        return app.t("about {n} h", {n: (minutes / 60).toFixed(1)});
    };

    /** Minutes of which only the least and the most are known. */
    app.between = function(low, high) {
        if (high < 1) return app.about(high);
        const inHours = high >= 90;
        const least = inHours ? Math.floor(low / 6) / 10 : Math.floor(low);
        const most = inHours ? Math.ceil(high / 6) / 10 : Math.ceil(high);
        if (least === most) return app.about(high);
        if (inHours) return app.t("{low}–{high} h", {low: least, high: most});
        return least < 1 ? app.t("up to {n} min", {n: most}) : app.t("{low}–{high} min", {low: least, high: most});
    };

    app.bytes = function(count) {
        if (count === null || count === undefined) return "–";
        if (count < 1 << 20) return Math.max(1, Math.round(count / 1024)) + " KB";
        if (count < 1 << 30) return (count / (1 << 20)).toFixed(1) + " MB";
        return (count / (1 << 30)).toFixed(1) + " GB";
    };

    app.speed = (perSecond) =>
        perSecond >= 1
            ? app.t("{n} steps/s", {n: perSecond.toFixed(1)})
            : app.t("{n} s per step", {n: (1 / perSecond).toFixed(1)});

    app.date = (seconds) =>
        new Date(seconds * 1000).toLocaleString(undefined, {dateStyle: "medium", timeStyle: "short"});

    app.loss = (value) => (value === null || value === undefined ? "–" : value.toPrecision(3));

    // -- what this browser remembers

    app.remember = function(key, value) {
        try {
            if (value === null) localStorage.removeItem(PREFIX + key);
            else localStorage.setItem(PREFIX + key, JSON.stringify(value));
        } catch (error) {
            console.debug("nothing is remembered:", error); // private windows and full stores: only comfort is lost
        }
    };
    app.recall = function(key) {
        try {
            return JSON.parse(localStorage.getItem(PREFIX + key));
        } catch (error) {
            return null;
        }
    };
})(loraTrainer);
window.loraTrainer = loraTrainer;
