"""Distillation: a smaller student learns the predictions of a trained run.

Command:   python train.py configs/distill.py
Hardware:  a laptop
Data:      the Python library, as for the teacher; the student has the teacher's tokenizer
Time:      149 s on two cores of an Intel Xeon
Expect:    a student of 0.6M parameters with 1.67 bits per byte, and a KL divergence of 0.12 nats
           from the teacher
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
