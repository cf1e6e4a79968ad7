# Celery Platform. `make help` lists the targets.
ENV  ?= quickstart
ARGS ?=

VENV   := .venv
BIN    := $(VENV)/bin
PLAY   := $(BIN)/ansible-playbook -i inventories/$(ENV)
LAB    := .lab/inventories-$(ENV)
SSH    := ssh -F $(LAB)/ssh_config
WORKER  = $(shell $(BIN)/ansible -i inventories/$(ENV) --list-hosts 'celery_worker[0]' | awk 'END {print $$1}')
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg

.DEFAULT_GOAL := help
.PHONY: help deploy demo status ssh secrets destroy test lint unit coverage molecule drills docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  ENV=<name> chooses inventories/<name> (now: $(ENV)); ARGS=… goes to ansible-playbook."

deploy: $(VENV)/controller ## Set up everything in ENV; a lab environment's hosts are started on this machine
	@$(PLAY) playbooks/lab.yml $(ARGS)
	@$(PLAY) site.yml $(ARGS)
	@if [ -f $(LAB)/ssh_config ]; then $(MAKE) --no-print-directory demo; fi
	@$(MAKE) --no-print-directory status
	@echo
	@echo "What to type next:"
	@if [ -f $(LAB)/ssh_config ]; then echo "  make ssh ENV=$(ENV)          a shell on $(WORKER); there: celery-exec celery inspect active"; fi
	@echo "  make deploy ENV=$(ENV)       again, after a change in inventories/$(ENV)"
	@if [ -f $(LAB)/ssh_config ]; then echo "  make destroy ENV=$(ENV)      remove the lab's hosts"; fi

demo: $(VENV)/controller ## Send tasks to all queues of the example application and show their results
	@echo; echo "Sending tasks to all queues:"
	@if [ -t 1 ]; then tty=-tt; fi; $(SSH) -q $$tty $(WORKER) celery-exec python -m orders.demo

status: $(VENV)/controller ## Show what runs where
	@$(PLAY) playbooks/operations/status.yml $(ARGS)

ssh: ## Open a shell on a lab host (HOST=…)
	@$(SSH) $(or $(HOST),$(WORKER))

secrets: $(VENV)/controller ## Write random values for the secrets that ENV lacks; encrypt them with ansible-vault
	@$(PLAY) playbooks/operations/generate_secrets.yml $(ARGS)

destroy: $(VENV)/controller ## Remove the lab hosts of ENV
	@$(PLAY) playbooks/lab.yml -e lab_state=absent

test: lint unit molecule ## Everything that .ci/run runs

lint: $(VENV)/test ## Lint and types
	$(BIN)/yamllint --strict .
	$(BIN)/ansible-lint --offline
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	cd runtime && ../$(BIN)/mypy

# Debian's packages that tests need on this machine. Installed as if systemd were away, so that the packages' own services do
# not start.
define packages
@dpkg-query --show $(1) >/dev/null 2>&1 || { apt-get update -qq && \
  SYSTEMD_OFFLINE=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) >/dev/null; }
endef

# The tests start servers of their own from these packages, make certificates, and judge alert rules (promtool).
SERVERS := redis-server rabbitmq-server openssl prometheus
unit: $(VENV)/test ## Unit tests of the plugins and the runtime package; the roles' documentation
	$(call packages,$(SERVERS))
	$(BIN)/pytest -q --numprocesses=2 --dist=loadfile

coverage: $(VENV)/test ## How much of the runtime package its tests run
	@mkdir -p .lab/coverage
	COVERAGE_FILE=$(CURDIR)/.lab/coverage/data $(BIN)/coverage run -m pytest -q $(or $(ARGS),runtime/tests)
	COVERAGE_FILE=$(CURDIR)/.lab/coverage/data $(BIN)/coverage combine --quiet
	COVERAGE_FILE=$(CURDIR)/.lab/coverage/data $(BIN)/coverage report --fail-under=90

# The tests of the lab open its pages in a browser, which is told the lab's authority (certutil).
BROWSER := chromium chromium-driver libnss3-tools
molecule: $(VENV)/test ## The quickstart on Debian 12, the lab of several hosts on Debian 13
	$(call packages,$(BROWSER))
	PATH="$(CURDIR)/$(BIN):$$PATH" molecule/run

DRILLS := molecule/lab/inventory
drills: $(VENV)/test ## Break a lab of six hosts again and again under a stream of tasks; print what became of them
	$(call packages,$(BROWSER))
	@rm -f .lab/drills.txt $(DRILLS)/group_vars/all/test_moved.yml
	$(BIN)/ansible-playbook -i $(DRILLS) playbooks/lab.yml
	$(BIN)/ansible-playbook -i $(DRILLS) site.yml
	DRILLS=full $(BIN)/pytest -v --ansible-inventory=$(DRILLS) --connection=ansible molecule/lab/tests; \
	  passed=$$?; cat .lab/drills.txt; $(BIN)/ansible-playbook -i $(DRILLS) playbooks/lab.yml -e lab_state=absent; exit $$passed

docs: $(VENV)/test ## Write the variables' tables in the roles' READMEs
	@for role in roles/*/; do $(BIN)/aar-doc --output-template docs/role-variables.md.j2 $$role markdown; done

clean: destroy ## Remove the lab hosts of ENV, their images, the virtual environment and all caches
	podman image rm --force $$(podman images --quiet --filter reference='localhost/celery-lab*')
	rm -rf $(VENV) .lab .ansible .pytest_cache .ruff_cache .mypy_cache

$(VENV)/controller: requirements.txt
	@test -x $(BIN)/python || python3 -m venv $(VENV)
	@echo "Installing Ansible into $(VENV) …"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/test: requirements-test.txt $(VENV)/controller
	@echo "Installing the test tools into $(VENV) …"
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@
