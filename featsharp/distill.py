"""Distil teachers with upsampled features into a small student, without labels.

    python -m featsharp.distill teachers=vits14-focus upsamplers=vits14-focus/featsharp-2x train_data_dir=photos
    featsharp eval segmentation --data camvid --backbone student:outputs/distill/last.pth --upsampler identity-1x

``featsharp distill -h`` describes arguments and results.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from featsharp.training.command import run_command

if TYPE_CHECKING:
    from featsharp.training.distillation import Distillation, DistillConfig, Student, StudentTrainer
    from featsharp.training.trainer import Validation


def main(arguments: Sequence[str] | None = None) -> int:
    """Distil by command-line arguments; returns the exit status, see :func:`featsharp.training.command.run_command`."""
    return run_command("distill", __doc__ or "", _compose, distill, arguments)


def _compose(overrides: Sequence[str]) -> "DistillConfig":
    from featsharp.configs.compose import compose_distillation

    return compose_distillation(overrides)


def distill(config: "DistillConfig") -> "StudentTrainer":
    """Run a distillation to its end; returns the finished trainer.

    Raises:
        ConfigError: For teachers, upsamplers or a student that do not exist or do not fit together.
        DataError: When ``train_data_dir`` holds no images.
        Terminated: On SIGTERM, after everything is saved.
    """
    import torch

    from featsharp.backbones.student import STUDENT_FILE
    from featsharp.data.loader import ViewDataset, check_repeatable
    from featsharp.training.distillation import Distillation, Student, StudentTrainer, open_teachers
    from featsharp.training.setup import fit_normalizer, open_mixture, start_run

    with start_run(config, STUDENT_FILE) as run:
        mixture = open_mixture(config.train_data_dir, config)
        if config.feature_cache.samples:
            check_repeatable(mixture)
        teachers = open_teachers(config, run.world)
        torch.manual_seed(config.seed)
        student = Student(config.student, teachers).to(run.world.device)
        objective = Distillation(teachers, config).to(run.world.device)
        dataset = ViewDataset(mixture, student.trunk.input_size, config.views, config.seed)
        validate = HeldOut(config) if run.world.is_main else None
        if run.earlier is None:
            run.open_writer()
            for teacher, normalizer in zip(teachers, objective.normalizers, strict=True):
                fit_normalizer(normalizer, teacher.backbone, teacher.encoder.input_conditioner, config, run.world)
        trainer = StudentTrainer(student, objective, dataset, config, run.folder, run.world, validate=validate)
        run.train(trainer)
    return trainer


class HeldOut:
    """The losses on the centres of the first images of ``val_data_dir``."""

    def __init__(self, config: "DistillConfig") -> None:
        from featsharp.validation import ValidationSamples

        self.samples = ValidationSamples(config.val_data_dir, config.viz.num_images)

    def __call__(self, student: "Student", objective: "Distillation") -> "Validation":
        """Compute the mean losses over the images."""
        import torch

        from featsharp.data.images import image_to_tensor
        from featsharp.evaluation.features import centre_crop
        from featsharp.training.trainer import Validation

        rows = []
        for image in self.samples.images:
            crop = image_to_tensor(centre_crop(image, student.trunk.input_size))
            losses = objective(student, crop[None].to(student.trunk.positions.device))
            rows.append([float(losses.total), float(losses.reconstruction), float(losses.terms["summary"])])
        total, spatial, summary = torch.tensor(rows).mean(0).tolist()
        scalars = {"val/total": total, "val/reconstruction": spatial, "val/summary": summary}
        return Validation(-total, scalars, {}, self.samples.tag)


if __name__ == "__main__":
    sys.exit(main())
