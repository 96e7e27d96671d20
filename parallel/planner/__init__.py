"""What a layout costs before it is run: memory per GPU, time of a step, and the layouts that fit."""
