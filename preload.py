"""Runs before torch is imported: adds our command-line argument to the WebUI's."""


def preload(parser):
    parser.add_argument(
        "--lora-trainer-dir",
        type=str,
        default=None,
        help="folder for the LoRA trainer's data sets, jobs and logs (default: lora_trainer in the data folder)",
    )
