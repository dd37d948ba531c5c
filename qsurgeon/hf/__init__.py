"""What qsurgeon does inside transformers, peft, TRL and Liger. The parts are imported by name."""
