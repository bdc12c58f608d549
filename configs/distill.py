"""Distillation: a smaller student learns what a trained run predicts.

Command:   python train.py configs/distill.py
Hardware:  a laptop
Data:      the Python library, as for the teacher, whose tokenizer the student has
Time:      149 s on two cores of an Intel Xeon
Expect:    a student of 0.6M parameters, 1.67 bits per byte and 0.12 nats from its teacher's guesses
"""

from dataclasses import replace

from default import config as teacher

from jaxgpt.objectives import Distill

config = replace(
    teacher,
    name="",
    model=replace(teacher.model, L=2, D=96, N=2, F=256),
    objective=Distill(teacher="runs/default", share=0.5, temperature=2.0),
)
