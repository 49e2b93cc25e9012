// What the tab does in the rest of the WebUI: the LoRA picker, txt2img's prompt, pictures from its gallery.
(function(app) {
    "use strict";

    const host = (app.host = {});
    const root = () => (typeof gradioApp === "function" ? gradioApp() : document);

    /** Make the LoRA pickers list what is new: the host's own hidden buttons, which also leave other tabs alone. */
    host.refreshPicker = function() {
        for (const tab of ["txt2img", "img2img"]) {
            const button = root().querySelector(`#${tab}_lora_extra_refresh_internal`);
            if (button) button.dispatchEvent(new Event("click"));
        }
    };

    /** Show a checkpoint as chosen at the top, where the host has a way to do so. */
    host.showCheckpoint = function(title) {
        if (typeof selectCheckpoint === "function" && root().querySelector("#change_checkpoint")) selectCheckpoint(title);
    };

    host.openTab = function(id) {
        const tabs = Array.from(root().querySelectorAll("#tabs > .tabitem"));
        const buttons = root().querySelectorAll("#tabs > .tab-nav > button");
        const index = tabs.findIndex((tab) => tab.id === "tab_" + id);
        if (buttons[index]) buttons[index].click();
    };

    /** Write a text into one of the host's text fields, as if it had been typed. */
    function type(field, text) {
        field.value = text;
        if (typeof updateInput === "function") updateInput(field);
        else field.dispatchEvent(new Event("input", {bubbles: true}));
    }

    /** Whether there is a prompt to try LoRAs in; without a WebUI this page is all there is. */
    host.hasPrompt = () => Boolean(root().querySelector("#txt2img_prompt textarea"));

    /** Put <lora:name:0.8> and the trigger word into txt2img's prompt and go there. Other LoRAs and words stay. */
    host.tryIt = async function(job) {
        const field = root().querySelector("#txt2img_prompt textarea");
        if (!field) return;
        const {settings} = await app.post("/settings/check", {yaml: job.effective_config || (await app.fetchJson("/jobs/" + job.id)).effective_config});
        const name = job.published || job.name;
        const own = typeof opts !== "undefined" && opts.extra_networks_default_multiplier < 1 && !app.ways.isChange(job.task);
        const usual = own ? opts.extra_networks_default_multiplier : app.usualWeight(job);
        const call = `<lora:${name}:${job.chosen_weight || usual}>`;
        const earlier = field.value.replace(new RegExp(`\\s*<lora:${escaped(name)}:[^>]*>`, "g"), "").trim();
        const trigger = settings.trigger_word;
        const words = trigger && !earlier.includes(trigger) ? [trigger, earlier] : [earlier];
        type(field, `${words.filter(Boolean).join(", ")} ${call}`.trim());
        host.refreshPicker(); // this page may have been opened after the training ended
        host.openTab("txt2img");
        field.focus();
    };

    const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

    /** Buttons beside the galleries' own that send pictures here. */
    host.addSendButtons = function() {
        addButton("txt2img", "send", app.t("Train LoRA"), app.t("Send the pictures to Train LoRA, with their prompts as captions"), () => host.send("txt2img"));
        for (const tab of ["txt2img", "img2img"]) {
            addButton(tab, "before_of_" + tab, app.t("as before"), app.t("Send the picture to Train LoRA, as the one before a change"), () => host.sendToPair(tab, "before"));
            addButton(tab, "after_of_" + tab, app.t("as after"), app.t("Send the picture to Train LoRA, as the one after a change"), () => host.sendToPair(tab, "after"));
        }
    };

    function addButton(tab, id, text, title, send) {
        const row = root().querySelector("#image_buttons_" + tab);
        if (!row || app.get(id)) return;
        const model = row.querySelector("button");
        const button = app.el("button", {type: "button", id, title, onclick: () => send().catch((error) => app.complain(error))}, text);
        button.className = model ? model.className : "";
        // The host's are squares for one sign each.
        Object.assign(button.style, {flex: "0 0 auto", width: "auto", minWidth: "max-content", maxWidth: "none", paddingInline: "10px", whiteSpace: "nowrap"});
        (model ? model.parentElement : row).append(button);
    }

    /** The pictures in a gallery, by address. */
    function inGallery(tab) {
        const images = new Map();
        root().querySelectorAll(`#${tab}_gallery img`).forEach((image) => images.set(image.src.replace(/\?.*$/, ""), image));
        return images;
    }

    /** The file at an address, and the generation parameters that it, or the gallery, has. */
    async function fetched(tab, address) {
        const data = await (await fetch(address)).arrayBuffer();
        return {file: new File([data], fileName(address)), drawn: parameters(data) || shownParameters(tab)};
    }

    host.send = async function(tab) {
        const images = inGallery(tab);
        if (!images.size) return;
        const files = [];
        for (const address of withoutGrid(images)) {
            const {file, drawn} = await fetched(tab, address);
            file.caption = promptOf(drawn);
            files.push(file);
        }
        host.openTab("lora_trainer");
        app.ways.open("pictures");
        await app.pictures.add(files);
    };

    /** The picture that is selected, or the first one, into the place of a pair: with its prompt, size and base model. */
    host.sendToPair = async function(tab, where) {
        const images = inGallery(tab);
        if (!images.size) return;
        const chosen = root().querySelector(`#${tab}_gallery .preview img, #${tab}_gallery .thumbnail-item.selected img`);
        const some = withoutGrid(images);
        const selected = chosen && chosen.src.replace(/\?.*$/, "");
        const address = some.includes(selected) ? selected : some[0]; // not the overview of several
        const {file, drawn} = await fetched(tab, address);
        host.openTab("lora_trainer");
        app.ways.open("pair");
        await app.pair.put(where, file, {caption: promptOf(drawn), ...(await asDrawn(drawn))});
    };

    /** The settings that generation parameters speak of; a base model only where it is another than the selected one. */
    async function asDrawn(text) {
        const found = text.slice(text.lastIndexOf("\nSteps: "));
        const [, size] = /\bSize: (\d+x\d+)/.exec(found) || [];
        const [, model] = /\bModel: ("(?:[^"\\]|\\.)*"|[^,\n]+)/.exec(found) || [];
        const sent = size ? {resolution: size} : {};
        if (!model) return sent;
        const name = model.replace(/^"(.*)"$/, "$1").trim();
        const {checkpoints} = await app.fetchJson("/checkpoints");
        const one = checkpoints.find(({title}) => fileName(title).replace(/ \[\w+\]$/, "").replace(/\.\w+$/, "") === name);
        return one ? {...sent, base_model: one.selected ? undefined : one.title} : sent;
    }

    /** The name at the end of an address, where a path of Windows may stand, and a "%" that encodes nothing. */
    function fileName(address) {
        const name = (text) => text.split(/[\\/]/).pop();
        try {
            return name(decodeURIComponent(address));
        } catch (error) {
            return name(address);
        }
    }

    /** The addresses of the pictures, without the overview that the host draws of several: it is of another size. */
    function withoutGrid(images) {
        const sizes = Array.from(images.values(), (image) => image.naturalWidth * image.naturalHeight);
        const largest = Math.max(...sizes);
        const others = new Set(sizes.filter((size) => size !== largest));
        const one = sizes.indexOf(largest) === sizes.lastIndexOf(largest) && others.size === 1 && sizes.length > 2;
        return Array.from(images.keys()).filter((address, index) => !one || sizes[index] !== largest);
    }

    /** The generation parameters that a PNG carries, as text; "" where it has none. */
    function parameters(data) {
        const view = new DataView(data);
        const text = (start, length) => new TextDecoder().decode(new Uint8Array(data, start, length));
        for (let place = 8; place + 12 <= data.byteLength;) {
            const length = view.getUint32(place);
            const kind = text(place + 4, 4);
            const key = "parameters\0";
            if ((kind === "tEXt" || kind === "iTXt") && length > key.length && text(place + 8, key.length) === key) {
                // An iTXt has flags, a language and a translated key, none of which the host sets, before its text.
                const skip = key.length + (kind === "iTXt" ? 4 : 0);
                return kind === "iTXt" ? text(place + 8 + skip, length - skip)
                    : new TextDecoder("latin1").decode(new Uint8Array(data, place + 8 + skip, length - skip));
            }
            place += length + 12;
        }
        return "";
    }

    /** The parameters of the picture that the gallery shows. */
    const shownParameters = (tab) => (root().querySelector("#html_info_" + tab) || {innerText: ""}).innerText.trim();

    /** The prompt in generation parameters, without LoRA calls. */
    function promptOf(text) {
        const prompt = text.split(/\n(?:Negative prompt: |Steps: )/)[0];
        return prompt.replace(/<[^>]*>/g, "").replace(/\s+/g, " ").trim().replace(/^[,\s]+|[,\s]+$/g, "");
    }
})(loraTrainer);
