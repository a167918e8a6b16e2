"""Ready-made questions: an anchor with its cost, data and optimizer state."""

from volumejax.tasks.digits import Task as Task
from volumejax.tasks.digits import digits_task as digits_task
