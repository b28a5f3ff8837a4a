"""The update of the student: the step's gradients, the exchange of rollouts before, AdamW after."""
