"""Routes of what helps with editing: tags, checks and their fixes, captioners, token preview, export, backups."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter, Query

from lora_trainer.api import editor_schemas as schemas
from lora_trainer.api.context import Context
from lora_trainer.api.editor import PAGE, Views, free_session
from lora_trainer.api.route import new_router
from lora_trainer.config import parse_resolution
from lora_trainer.errors import UserError
from lora_trainer.workspace.captioners import captioner_sources
from lora_trainer.workspace.sessions import EditorSession

_CHUNK = 75
_MAX_TEXT = 20_000


def routes(context: Context) -> APIRouter:
    router = new_router(context, "editor")
    sessions = context.manager.sessions
    views = Views(context)

    @router.get("/editor/{session}/tags", response_model=schemas.TagsModel)
    def tags(session: str, limit: int = Query(500, ge=1, le=5000)) -> dict[str, Any]:
        """Frequencies of the captions as they are now, suggestions and near-synonyms."""
        editor = sessions.get(session)
        return editor.derived(f"tags {limit}", lambda: _tags(editor, limit))

    @router.post("/editor/{session}/check", response_model=schemas.EditorModel, status_code=202)
    def check(session: str, wish: schemas.CheckModel) -> dict[str, Any]:
        """Check every picture and caption in the background."""
        editor = sessions.get(session)
        size = parse_resolution(wish.resolution)
        if not isinstance(size, tuple):
            raise UserError(f"{wish.resolution!r} is no size.", field="resolution", remedy="Write 512 or 768x512.")
        editor.trigger_word = wish.trigger_word.strip() or editor.trigger_word
        sessions.check(editor, size)
        return views.state(editor)

    @router.get("/editor/{session}/report", response_model=schemas.ReportModel)
    def report(session: str) -> dict[str, Any]:
        """What the last check found, each finding with what can be done about it."""
        editor = sessions.get(session)
        found = _report(editor)
        facts = found.to_json()
        facts["findings"] = [_finding(context, index, one) for index, one in enumerate(found.findings)]
        facts["stale"] = editor.report_revision != editor.session.revision
        return facts

    @router.post("/editor/{session}/fix", response_model=schemas.ChangedModel)
    def fix(session: str, wish: schemas.ApplyFixModel) -> dict[str, Any]:
        """Do a finding's fix as a step that can be undone; or everything that is safe, each as a step."""
        from lora_trainer.dataset.editing import Step
        from lora_trainer.dataset.fixes import apply_fix, apply_safe_fixes

        editor = free_session(sessions, session)
        findings = _report(editor).findings
        if wish.all_safe:
            steps = apply_safe_fixes(editor.session, findings)
            keys = dict.fromkeys(key for step in steps for key in step.keys)
            return views.changed(editor, Step(f"{len(steps)} fixes", captions=dict.fromkeys(keys, ("", ""))))
        if wish.index is None or not 0 <= wish.index < len(findings):
            raise UserError("There is no such finding.", field="index", remedy="Load the report again.")
        return views.changed(editor, apply_fix(editor.session, findings[wish.index], wish.name))

    @router.post("/editor/{session}/caption", response_model=schemas.EditorModel, status_code=202)
    def caption(session: str, wish: schemas.CaptionModel) -> dict[str, Any]:
        """Describe pictures in the background. Nothing is downloaded."""
        from lora_trainer.captioning.base import Settings
        from lora_trainer.captioning.postprocess import CaptionOptions
        from lora_trainer.captioning.registry import check_available, choose
        from lora_trainer.run.captioning import CaptionJob

        editor = sessions.get(session)
        if not 1 <= wish.batch_size <= 256:
            raise UserError("Use 1 to 256 pictures at once.", field="batch_size", remedy="8 is usual.")
        options = CaptionOptions(
            wish.template,
            wish.trigger_word,
            wish.kind,
            wish.keep_all,
            tuple(wish.blacklist),
            dict(wish.replacements),
            wish.max_tags,
        )
        options.check()
        sources = captioner_sources(context.host)
        name = choose(wish.captioner, sources)
        check_available(name, sources)
        device = str(context.host.device())
        settings = Settings(device, wish.threshold, wish.character_threshold)
        sessions.caption(
            editor,
            lambda known: CaptionJob(
                known.folder, name, wish.mode, options, settings, wish.batch_size, wish.files  # type: ignore[arg-type]
            ),
            sources,
        )
        return views.state(editor)

    @router.post("/editor/{session}/cancel", response_model=schemas.EditorModel)
    def cancel(session: str) -> dict[str, Any]:
        """Cancel the folder's task; what it has written stays."""
        editor = sessions.get(session)
        if editor.task is not None:
            editor.task.cancel()
        return views.state(editor)

    @router.get("/captioners", response_model=schemas.CaptionersModel)
    def captioners() -> dict[str, Any]:
        """Every captioner, and what those that cannot run here lack."""
        from lora_trainer.captioning.postprocess import ARTICLE_TEMPLATE
        from lora_trainer.captioning.presets import PRESETS
        from lora_trainer.captioning.registry import available
        from lora_trainer.dataset.writing import MODES

        return {
            "captioners": [
                {"name": one.name, "title": one.title,
                 "problem": context.plain(one.problem), "remedy": context.plain(one.remedy)}
                for one in available(captioner_sources(context.host))
            ],
            "kinds": [{"kind": one.kind, "title": one.title, "hint": one.hint} for one in PRESETS.values()],
            "modes": list(MODES),
            "template": ARTICLE_TEMPLATE,
        }  # fmt: skip

    @router.post("/captions/preview", response_model=schemas.PreviewedModel)
    def preview(wish: schemas.PreviewModel) -> dict[str, Any]:
        """What the tokenizer sees of a caption, token by token."""
        return _preview(wish)

    @router.post("/editor/{session}/export", response_model=schemas.ExportedModel)
    def export(session: str, wish: schemas.ExportModel) -> dict[str, Any]:
        """Write all saved captions in another format into the folder, beside what is there."""
        from lora_trainer.dataset.exporting import export_captions

        editor = free_session(sessions, session)
        _refuse_unsaved(editor)
        exported = export_captions(editor.session.folder, wish.format)
        editor.session.refresh()
        return {
            "files": len(exported.written.files),
            "backup": exported.written.backup,
            "note": exported.note,
            "state": views.state(editor),
        }

    @router.get("/editor/{session}/backups", response_model=schemas.BackupsModel)
    def backups(session: str) -> dict[str, Any]:
        """The numbered backups of the folder's caption files, the newest first."""
        from lora_trainer.dataset.backups import list_backups

        found = list_backups(sessions.get(session).session.root)[:PAGE]
        return {"backups": [{"number": one.number, "time": one.time, "files": list(one.files[:20])} for one in found]}

    @router.post("/editor/{session}/restore", response_model=schemas.EditorModel)
    def restore(session: str, wish: schemas.RestoreModel) -> dict[str, Any]:
        """Put a backup's files back; what they replace is backed up first."""
        from lora_trainer.dataset.backups import restore_backup

        editor = free_session(sessions, session)
        _refuse_unsaved(editor)
        restore_backup(editor.session.root, wish.number)
        editor.session.refresh()
        return views.state(editor)

    return router


def _tags(editor: EditorSession, limit: int) -> dict[str, Any]:
    from lora_trainer.dataset.tags import near_synonyms, suggestions, tag_table

    session = editor.session
    captions = {key: session.parsed(key) for key, text in session.captions.items() if text}
    table = tag_table(captions)
    return {
        "total": len(table),
        "tags": [vars(tag) for tag in table[:limit]],
        "suggestions": [
            {"file": one.key, "tag": one.tag, "because": one.because, "confidence": one.confidence,
             "support": one.support}
            for one in suggestions(captions)[:limit]
        ],
        "synonyms": [vars(pair) for pair in near_synonyms(captions)[:limit]],
    }  # fmt: skip


def _report(editor: EditorSession) -> Any:
    if editor.report is None:
        raise UserError("This folder has not been checked yet.", remedy="Check it first.")
    return editor.report


def _finding(context: Context, index: int, finding: Any) -> dict[str, Any]:
    from lora_trainer.dataset.fixes import fixes_of

    return {
        "index": index,
        "file": context.plain(finding.file),
        "kind": finding.kind,
        "severity": finding.severity,
        "message": context.plain(finding.message),
        "remedy": finding.remedy,
        "files": list(finding.files[:PAGE]),
        "fixes": [vars(fix) for fix in fixes_of(finding)],
    }


def _preview(wish: schemas.PreviewModel) -> dict[str, Any]:
    from lora_trainer.dataset.caption_checks import estimate_tokens
    from lora_trainer.dataset.captions import core_texts, parse, prompt_text, train_text
    from lora_trainer.models.tokenizer import load_tokenizer

    if len(wish.caption) > _MAX_TEXT:
        raise UserError("The caption is too long.", field="caption", remedy="225 tokens are read at most.")
    caption = parse(wish.caption)
    text = train_text(caption, trigger_word=wish.trigger_word, weighted=wish.weighted)
    try:
        tokens = load_tokenizer().pieces(text)
        count = len(tokens)
    except UserError:  # CLIP's vocabulary is not on this machine; the count is then an estimate
        tokens, count = None, estimate_tokens(text)
    return {
        "train": text,
        "prompt": prompt_text(caption),
        "core": list(core_texts(caption)),
        "tokens": tokens,
        "count": count,
        "chunks": max(1, math.ceil(count / _CHUNK)),
        "warnings": list(caption.warnings),
    }


def _refuse_unsaved(editor: EditorSession) -> None:
    if count := len(editor.session.unsaved):
        raise UserError(f"{count} changes are not saved.", remedy="Save or discard them first.")
