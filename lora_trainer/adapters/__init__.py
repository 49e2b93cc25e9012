"""The networks that are trained: LoRA, LoCon, DoRA, LoHa, LoKr; and their files.

``inject.AdapterSet`` builds and attaches them, ``export`` writes the files, ``lora_file`` reads anyone's,
``initialize`` continues from one, ``merge`` puts one into a checkpoint, ``describe`` says what one is.
"""
