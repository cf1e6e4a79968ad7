# Celery Platform. `make help` lists the targets.
ENV  ?= quickstart
ARGS ?=

INVENTORY := inventories/$(ENV)
VENV   := .venv
BIN    := $(VENV)/bin
PLAY   := $(BIN)/ansible-playbook -i $(INVENTORY)
LAB    := .lab/$(subst /,-,$(INVENTORY))
LOG    := $(LAB)/deploy.log
SSH    := ssh -F $(LAB)/ssh_config
WORKER  = $(shell $(BIN)/ansible -i $(INVENTORY) --list-hosts 'celery_worker[0]' | awk 'END {print $$1}')
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
# A line for each part of a run, or, without parts, only what it shows; all else is in the log. No inventory has all groups.
SHOW   := ANSIBLE_STDOUT_CALLBACK=progress ANSIBLE_HOST_PATTERN_MISMATCH=ignore
ASK    := CELERY_PLATFORM_PARTS=no $(SHOW) $(PLAY)
DEPLOY := ANSIBLE_LOG_PATH=$(LOG) $(SHOW) $(PLAY)
STARTED := $(shell date +%s)
# Print a part as the callback plugin does: $(call part,name,start)
part    = printf '%-52s %10s s\n' '$(1)' $$(($$(date +%s) - $(2)))

.DEFAULT_GOAL := help
.PHONY: help deploy demo status ssh environment secrets destroy lab-snapshot lab-restore test packages lint unit coverage molecule test-all drills bench-converge docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile
	@echo "  ENV=<name> chooses inventories/<name> (now: $(ENV)); ARGS=… goes to ansible-playbook."

# What was deployed is shown also if it does not work.
deploy: $(VENV)/controller ## Set up everything in ENV; a lab environment's hosts are started on this machine
	@install -d -m 0700 $(LAB) && install -m 0600 /dev/null $(LOG)
	@$(DEPLOY) playbooks/lab.yml $(ARGS)
	@$(DEPLOY) site.yml $(ARGS)
	@wrong=0; echo; \
	  if [ -f $(LAB)/ssh_config ]; then $(ASK) playbooks/operations/demo.yml $(ARGS) || wrong=1; echo; fi; \
	  $(ASK) playbooks/operations/status.yml $(ARGS) || wrong=1; \
	  echo; echo "What to type next:"; \
	  if [ -f $(LAB)/ssh_config ]; then echo "  make ssh ENV=$(ENV)          a shell on $(WORKER); there: celery-exec celery inspect active"; fi; \
	  echo "  make deploy ENV=$(ENV)       again, after a change in $(INVENTORY)"; \
	  if [ -f $(LAB)/ssh_config ]; then echo "  make destroy ENV=$(ENV)      remove the lab's hosts"; fi; \
	  seconds=$$(($$(date +%s) - $(STARTED))); echo; \
	  echo "Deployed in $$((seconds / 60)) min $$((seconds % 60)) s. All that Ansible said: $(LOG)"; exit $$wrong

demo: $(VENV)/controller ## Send tasks through all queues and show their results
	@$(ASK) playbooks/operations/demo.yml $(ARGS)

status: $(VENV)/controller ## Show what runs where and what waits; fail if something is wrong
	@$(ASK) playbooks/operations/status.yml $(ARGS)

ssh: ## Open a shell on a lab host (HOST=…)
	@[ -f $(LAB)/ssh_config ] || { echo "No lab of $(INVENTORY) runs on this machine: make deploy ENV=$(ENV)" >&2; exit 1; }
	@$(SSH) $(or $(HOST),$(WORKER))

environment: $(VENV)/controller ## Create inventories/<ENV>, an environment of your own, as a copy (FROM=production, quickstart)
	@$(BIN)/ansible-playbook -i localhost, playbooks/operations/create_environment.yml

secrets: $(VENV)/controller ## Write random values for the secrets that ENV lacks; encrypt them with ansible-vault
	@test -d inventories/$(ENV) || { echo "There is no inventories/$(ENV)." >&2; exit 2; }
	@$(BIN)/ansible-playbook -i localhost, playbooks/operations/generate_secrets.yml -e secrets_inventory=$(CURDIR)/inventories/$(ENV) $(ARGS)

destroy: $(VENV)/controller ## Remove the lab hosts of ENV
	@$(SHOW) $(BIN)/ansible-playbook -i localhost, playbooks/lab.yml \
	  -e lab_state=absent -e lab_inventory=$(abspath $(INVENTORY)) $(ARGS)

lab-snapshot: $(VENV)/controller ## Save what is on the lab hosts of ENV
	@$(DEPLOY) playbooks/lab.yml -e lab_state=saved $(ARGS)

lab-restore: $(VENV)/controller ## Go back to what was saved of the lab hosts of ENV, in seconds
	@$(DEPLOY) playbooks/lab.yml -e lab_state=restored $(ARGS)

# Two at a time: on two cores, each of them waits half of its time, for a server or for time to pass.
test: packages ## Everything that .ci/run runs
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target unit scenario-default-bookworm
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint scenario-lab-trixie

lint: $(VENV)/test ## Lint and types
	$(BIN)/yamllint --strict .
	$(BIN)/ansible-lint --offline
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	cd runtime && ../$(BIN)/mypy

# Debian's packages that tests need on this machine: servers and tools that they start, among them openssl for certificates and
# promtool for alert rules, and a browser, which is told the lab's authority (certutil). Installed as if systemd were away, so that
# the packages' own services do not start.
PACKAGES := redis-server rabbitmq-server openssl prometheus prometheus-alertmanager nginx logrotate openssh-client \
            chromium chromium-driver libnss3-tools
packages: $(VENV)/test
	@dpkg-query --show $(PACKAGES) >/dev/null 2>&1 || { echo "Installing what the tests start …"; apt-get update -qq && \
	  SYSTEMD_OFFLINE=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES) >/dev/null; }

unit: packages ## Unit tests of the plugins and the runtime package; the roles' documentation
# Three on two cores: half of the time they wait, for a server or for time to pass.
	$(BIN)/pytest -q --numprocesses=3 --dist=loadfile

coverage: packages ## How much of the runtime package its tests run
	@mkdir -p .lab/coverage
	COVERAGE_FILE=$(CURDIR)/.lab/coverage/data $(BIN)/coverage run -m pytest -q $(or $(ARGS),runtime/tests)
	COVERAGE_FILE=$(CURDIR)/.lab/coverage/data $(BIN)/coverage combine --quiet
	COVERAGE_FILE=$(CURDIR)/.lab/coverage/data $(BIN)/coverage report --fail-under=90

molecule: scenario-default-bookworm scenario-lab-trixie ## The quickstart on Debian 12, the lab of several hosts on Debian 13

# scenario-<name>-<release>
scenario-%: packages
	@PATH="$(CURDIR)/$(BIN):$$PATH" molecule/run $(subst -,:,$*)

test-all: export TEST_ALL := yes
test-all: lint unit ## All tests, on both releases; hours
	PATH="$(CURDIR)/$(BIN):$$PATH" molecule/run default:bookworm default:trixie lab:trixie lab:bookworm redis:bookworm celery_app:trixie producer:trixie managed:trixie monitoring_proxy:trixie

DRILLS := molecule/lab/inventory
drills: packages ## Break a lab of six hosts again and again under a stream of tasks; print what became of them
	@rm -f .lab/drills.txt $(DRILLS)/group_vars/all/test_moved.yml
	$(BIN)/ansible-playbook -i $(DRILLS) playbooks/lab.yml
	$(BIN)/ansible-playbook -i $(DRILLS) site.yml
	DRILLS=full $(BIN)/pytest -v --ansible-inventory=$(DRILLS) --connection=ansible molecule/lab/tests; \
	  passed=$$?; cat .lab/drills.txt; $(BIN)/ansible-playbook -i $(DRILLS) playbooks/lab.yml -e lab_state=absent; exit $$passed

bench-converge: $(VENV)/test ## Time a run that changes nothing on a lab of six hosts, beside a play that only gathers facts
	$(BIN)/ansible-playbook -i $(DRILLS) playbooks/lab.yml
	$(BIN)/ansible-playbook -i $(DRILLS) site.yml
	@$(BIN)/python molecule/bench.py $(DRILLS); wrong=$$?; $(BIN)/ansible-playbook -i $(DRILLS) playbooks/lab.yml -e lab_state=absent; exit $$wrong

docs: $(VENV)/test ## Write the variables' tables in the roles' READMEs
	@for role in roles/*/; do $(BIN)/aar-doc --output-template docs/role-variables.md.j2 $$role markdown; done

# Other checkouts may use an image that was built here: it is kept as long as one of their hosts does.
clean: $(VENV)/controller ## Remove all labs of this checkout, the images it built, the virtual environment and all caches
	@if command -v podman >/dev/null; then \
	  podman ps --all --filter label=celery-lab --format '{{index .Labels "celery-lab"}}' | sort -u | grep '^$(CURDIR)/' | \
	    while read -r inventory; do $(MAKE) --no-print-directory destroy INVENTORY=$$inventory </dev/null || exit; done || exit; \
	  for image in $$(podman images --quiet --filter label=celery-lab-built-by=$(CURDIR) | sort -u); do \
	    podman image rm $$image >/dev/null 2>&1 || echo "Kept the image $$image, which another checkout's lab uses."; done; fi
	rm -rf $(VENV) .lab .ansible .pytest_cache .ruff_cache .mypy_cache

$(VENV)/controller: requirements.txt
	@test -x $(BIN)/python || python3 -m venv $(VENV)
	@echo "Installing Ansible into $(VENV) …"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(call part,Install Ansible on this machine,$(STARTED))
	@touch $@

$(VENV)/test: requirements-test.txt $(VENV)/controller
	@echo "Installing the test tools into $(VENV) …"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@
