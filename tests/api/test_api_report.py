"""The report of a run through the API: a page that cannot do anything, in the language that is asked for."""

from __future__ import annotations

from lora_trainer.config import from_mapping, to_yaml


def test_the_report_of_a_run(client, manager, settings):
    job = client.post("/jobs", json={"settings": settings}).json()
    address = f"/jobs/{job['id']}/report"
    assert client.get("/jobs/999/report").status_code == 404
    output = manager.folders.output(manager.store.get(job["id"]))
    for path in output.glob("*.config.yaml"):
        path.unlink()
    refused = client.get(address)
    assert refused.status_code == 400 and "not begun" in refused.json()["message"]
    output.mkdir(exist_ok=True)
    config = from_mapping({**settings, "trigger_word": "<script>zwx", "lora_rank": 7})
    (output / "cat.config.yaml").write_text(f"# cat, started 2026-11-28T12:00:00+00:00\n{to_yaml(config)}")
    answer = client.get(address)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert "sandbox" in answer.headers["content-security-policy"] and "&lt;script&gt;zwx" in answer.text
    assert "<script" not in answer.text and str(manager.folders.data) not in answer.text
    assert "Settings" in answer.text and "设置" in client.get(address + "?language=zh_CN").text
