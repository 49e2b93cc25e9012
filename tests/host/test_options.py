from __future__ import annotations

from types import SimpleNamespace

from lora_trainer.host.options import access_policy


def test_a_slip_in_the_list_of_folders_shuts_nobody_out(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    lines = f"~nobody-of-this-name/pictures\n\n  {tmp_path}  \n{tmp_path / 'circle'}\n\0"
    policy = access_policy(SimpleNamespace(listen=True), lines)
    assert tmp_path.resolve() in policy.roots
