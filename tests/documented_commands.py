"""Every command of README.md, CONTRIBUTING.md, SECURITY.md and docs/, and what runs it.

A command that is no line here, and a line that is no command there, fail tests/test_docs.py, which
has the flags of each read by its program, too. Pages of OWN_TESTS have tests of their own.
"""

OWN_TESTS = {
    "docs/pods.md": "tests/test_pods.py::test_a_command_does_what_it_says",
    "docs/results.md": "tests/test_report.py::"
    "test_the_results_in_the_docs_are_what_the_tables_give",
    "docs/sweeps.md": "tests/test_sweeps.py::test_a_command_of_the_page_does_what_it_says",
    "docs/deployment.md": "tests/test_deployment.py::test_an_export_command_does_what_it_says",
}

# What runs as it stands, or on less data: test, commands.
TESTED = {
    "tests/test_docs.py::test_pictures_of_blocks_are_drawn": ["python -m experiments.draw_halo"],
    "tests/test_docs.py::test_make_installs_with_the_interpreter_of_ones_choice": [
        "make demo PYTHON=python3.12",
    ],
    "tests/test_cost_split.py::test_the_page_has_the_tables_of_today": [
        "python -m experiments.cost_split",
    ],
    "tests/test_registry.py::test_the_readme_has_the_table_of_models": [
        "python -m halonet.models list",
    ],
    "tests/test_models_main.py::test_the_picture_is_written": [
        "python -m halonet.models show halonet_h4 --image_size=384 --picture=h4.png",
    ],
    "tests/test_convert.py::test_a_file_becomes_a_run_and_the_file_again": [
        "python -m halonet.models.convert timm halonet50ts.safetensors --model=halonet50ts "
        "--out=runs/halonet50ts",
        "python -m halonet.models.convert timm runs/halonet50ts --to=back.safetensors",
    ],
    "tests/system/test_imagenet.py::test_from_archives_to_an_evaluated_model": [
        "python -m halonet.data prepare imagenet2012 --manual_dir=~/archives "
        "--data_dir=~/tensorflow_datasets",
        "python -m halonet.data check --config=configs/mindcv_halonet_50t.py "
        "--images_per_second=1000 --sheet=sheet.png",
    ],
    "tests/system/test_imagenet.py::test_other_evaluation_sets_from_local_archives": [
        "python -m halonet.data prepare imagenet2012_real --manual_dir=~/archives "
        "--data_dir=~/tensorflow_datasets",
        "python -m halonet.data prepare imagenet_v2 --manual_dir=~/archives "
        "--data_dir=~/tensorflow_datasets",
    ],
    "tests/test_data_main.py::test_every_source_is_looked_at": [
        "python -m halonet.data check --config=configs/mnist.py",
        "python -m halonet.data check --config=configs/finetune.py "
        "--config.data.data_dir=~/photographs --sheet=sheet.png",
    ],
    "tests/test_finetune.py::test_photographs_are_told_apart_after_finetuning": [
        "python main.py --config=configs/finetune.py --workdir=runs/mine "
        "--config.data.data_dir=~/photographs --config.init.weights=runs/halonet50ts",
        "python main.py --config=configs/finetune.py --workdir=runs/mine --mode=evaluate "
        "--config.data.data_dir=~/photographs",
    ],
    "tests/test_run.py::test_evaluation_of_a_checkpoint_equals_that_of_the_run": [
        "python main.py --config=configs/demo.py --workdir=runs/demo --mode=evaluate",
        "python main.py --mode=evaluate --evaluate.checkpoint=runs/halonet50ts "
        "--workdir=runs/validated --config=configs/timm_halonet50ts.py "
        "--config.data.data_dir=~/tensorflow_datasets",
    ],
    "tests/system/test_processes.py::test_two_processes_train_as_one": [
        "python main.py --config=configs/mnist.py --workdir=runs/mnist",
    ],
    "tests/test_plan.py::test_a_plan_for_tpus": [
        "python main.py --config=configs/imagenet.py:halonet_h1 --mode=plan "
        "--plan.topology=v5e:2x4 --plan.out=plan.json",
        "python main.py --config=configs/imagenet.py:halonet_h1 --mode=plan "
        "--plan.topology=v4:4x4x8",
    ],
    "tests/test_plan_table.py::test_it_goes_on_where_it_stopped": [
        "python -m experiments.plan_table",
    ],
    "tests/test_launch.py::test_the_command_line_writes_a_file_a_run": [
        "python -m launch render --target=jobset --runs=runs.py --out=rendered --image=IMAGE",
    ],
    "tests/system/test_rehearsal.py::test_preempted_and_started_again_it_ends_as_undisturbed": [
        "python -m launch rehearse --processes=2 --devices=4 -- --config=configs/mnist.py "
        "--workdir=runs/two",
    ],
    "tests/system/test_sweeps.py::test_a_sweep_survives_the_kill_of_a_member_and_of_its_launcher": [
        "python -m experiments run block_halo_smoke --jobs=2",
        "python -m experiments status block_halo_smoke",
        "python -m experiments collect block_halo_smoke",
    ],
    "tests/test_notebooks.py::test_it_runs_in_a_kernel": ["python -m experiments.notebooks"],
    "tests/test_export.py::test_the_command_line_exports": [
        "python main.py --config=configs/demo.py --workdir=runs/demo --mode=export "
        "--export.out=exports/digits",
    ],
    "tests/test_export.py::test_the_command_runs_an_export": [
        "python -m halonet.exported exports/digits",
    ],
    "tests/test_augmentations.py::test_sheet_is_a_picture": ["python -m experiments.augmentations"],
}

# What .ci/run runs.
CI = ["make lint", "make test", "make demo", "make tpu-aot", "make docs", "make middle"]

# What no test runs, and why; the flags are read all the same.
UNTRIED = {
    "an hour, on a machine that does nothing else": [
        "make bench",
        "make bench ARGS=--what=op",
        "python -m experiments.bench_attention --batch=8",
        "python -m experiments.bench_input",
        "python -m experiments.overhead",
    ],
    "hours": [
        "make long",
        "python -m experiments.tpu_kernels",
        "python -m experiments.tpu_cost --calibrate",
    ],
    "a GPU": ["python -m experiments.bench_peers --device=cuda --batch=64"],
    "half an hour, and 6 GB of other packages": ["make parity"],
    "minutes of libtpu's compiler, for a model of 256 px": [
        "python -m experiments.tpu_cost --model=halonet_h0 --batch=16 --topology=v5e:2x2",
        "python -m experiments.tpu_cost --model=halonet_h0 --batch=16",
        "python -m experiments.tpu_cost --model=halonet_h1 --batch=16",
        "python -m experiments.tpu_cost --model=resnet50 --batch=16",
    ],
    "minutes of steps of a model of 256 px": [
        "python main.py --config=configs/default.py --workdir=runs/h0 "
        "--config.model.name=halonet_h0 --config.data.name=fake:64:1000 "
        "--config.data.batch_size=32 --config.eval.batch_size=32 --config.train.steps=20 "
        "--config.log.every_steps=1",
    ],
    "the test itself, as a whole": ["bash .ci/run"],
    "the newest packages there are": ["make lock"],
    "a part of `make docs`": ["make docs-env"],
    "a program of others": [
        "tensorboard --logdir runs/demo",
        "pip install google-cloud-storage",
        "source .venv/bin/activate",
    ],
}
