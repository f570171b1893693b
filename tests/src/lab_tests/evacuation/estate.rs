//! Four nodes in two racks, a mail server, machines that do nothing but run, and what is asked of them from outside.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use understudy_protocol::control::{VmmState, VmmStatus};
use understudy_protocol::evacuator::EvacuatorStatus;

use crate::bench::pair;
use crate::lab::mail::{DOMAIN, Mail, MailServer};
use crate::lab::net::{Plane, node};
use crate::lab::processes::{self, Copies, Process};
use crate::lab::{Lab, LabOptions, wait_for, wait_until};

/// The hosts. The first of them is never cut: half of the nodes decides if it is among them.
pub const HOSTS: [&str; 4] = ["n1", "n2", "n3", "n4"];
/// Longest that anything may take: an emulated processor carries four hosts. Nothing is measured by it.
pub const BOUND: Duration = Duration::from_secs(600);
/// Where the machines' kernel is, as a node sees it.
const KERNEL: &str = "/var/lib/understudy/halting";
/// Who answers questions, and is told everything each time.
pub const NIGHT: &str = "night@works.example";
/// Who is told the same only once.
pub const ONCE: &str = "once@works.example";

/// A machine of the estate.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Its name.
    pub name: &'static str,
    /// Its home.
    pub home: &'static str,
    /// What else the policy says of it.
    pub more: &'static str,
}

/// One line of the journal, as `understudy-crm watch --json` prints it.
#[derive(Debug, Clone, Deserialize)]
pub struct Event {
    /// Its number.
    pub number: u64,
    /// The node whose controller wrote it.
    pub node: String,
    /// One word.
    pub kind: String,
    /// The plan.
    pub plan: Option<String>,
    /// The machine.
    pub machine: Option<String>,
    /// A sentence.
    pub text: String,
}

/// A plan's machines, and how far each has come.
pub type Moves = Vec<(String, String)>;

/// The lab, its machines, and who looks at them.
#[derive(Debug)]
pub struct Estate {
    /// The cluster under it.
    pub lab: Lab,
    /// Where mails arrive.
    pub mail: MailServer,
    /// Whether any machine ever ran twice.
    pub copies: Copies,
    /// The machines that were configured.
    pub machines: Vec<Machine>,
    /// Seconds that fencing waits, from the next [`Self::configure`] on: there is time to see what is before it.
    pub fence_delay: u32,
}

impl Estate {
    /// Bring four nodes and a mail server up, with nothing configured.
    pub fn up(one_link: bool) -> Result<Self> {
        let lab =
            Lab::up(&LabOptions { bare: true, hosts: HOSTS.len(), mail: true, one_link, ..LabOptions::default() })?;
        let mail = MailServer::start(&lab, &HOSTS)?;
        for host in HOSTS {
            fs::write(lab.disk_file(host, "understudy/halting")?, pair::halting_kernel())
                .with_context(|| format!("giving {host} the machines' kernel"))?;
        }
        let copies = Copies::watch(lab);
        Ok(Self { lab, mail, copies, machines: Vec::new(), fence_delay: 0 })
    }

    /// `understudy-crm apply` of the estate with these machines, and `more` in the policy; back when all of them run at home.
    ///
    /// Machines are given in full: what was there before and is not among them is stopped.
    pub fn configure(&mut self, machines: &[Machine], more: &str) -> Result<()> {
        self.machines = machines.to_vec();
        let text = policy(machines, self.fence_delay, more);
        for host in HOSTS {
            fs::write(self.lab.disk_file(host, "etc-understudy/policy.toml")?, &text)
                .with_context(|| format!("writing the policy for {host}"))?;
        }
        self.lab.run(HOSTS[0], &["understudy-crm", "apply", "/etc/understudy/policy.toml"])?;
        self.wait_home()
    }

    // --------------------------------------------------------------------------------------------------- the machines

    /// The nodes in which `machine` is a process.
    pub fn nodes_of(&self, machine: &str) -> Result<Vec<String>> {
        let mut all = processes::machines(&self.lab)?;
        Ok(all.remove(machine).unwrap_or_default().into_iter().map(|p| p.node).collect())
    }

    /// `machine` is one process, on that node, and that VMM says that it runs.
    pub fn runs_on(&self, machine: &str, host: &str) -> Result<bool> {
        Ok(self.nodes_of(machine)? == [host] && self.vmm(machine, host)?.state == VmmState::Running)
    }

    /// Ask a VMM.
    pub fn vmm(&self, machine: &str, host: &str) -> Result<VmmStatus> {
        let text = self.lab.run(host, &["understudy-vmm", "status", "--machine", machine, "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("reading the status that understudy-vmm printed: {text}"))
    }

    /// Where each of `names` runs, when all of them do, on hosts other than `not`.
    pub fn wait_elsewhere(&self, names: &[&str], not: &str) -> Result<BTreeMap<String, String>> {
        let at = wait_for(&format!("{} elsewhere than on {not}", names.join(", ")), BOUND, || {
            let mut out = BTreeMap::new();
            // What has gone wrong for good is not waited for.
            if self.copies.never_twice().is_err() {
                return Ok(Some(out));
            }
            for name in names {
                let nodes = self.nodes_of(name)?;
                let [host] = &nodes[..] else { bail!("{name} is in {nodes:?}") };
                ensure!(host != not && self.vmm(name, host)?.state == VmmState::Running, "{name} on {host}");
                out.insert((*name).to_owned(), host.clone());
            }
            Ok(Some(out))
        })?;
        self.copies.never_twice()?;
        Ok(at)
    }

    /// Every machine runs at home, once.
    pub fn wait_home(&self) -> Result<()> {
        wait_until("every machine at home", BOUND, || {
            for machine in &self.machines {
                ensure!(self.runs_on(machine.name, machine.home)?, "{} not on {}", machine.name, machine.home);
            }
            Ok(true)
        })
    }

    /// After a story: no machine was ever in two nodes, all hosts are up, and all machines go home.
    pub fn settle(&self) -> Result<()> {
        self.lab.heal(None)?;
        for host in HOSTS {
            self.lab.boot(host)?;
        }
        self.lab.wait_online(&HOSTS, BOUND)?;
        for machine in &self.machines {
            if self.nodes_of(machine.name)? != [machine.home] {
                // It fails where nothing was evacuated, and whether the machine then goes home is seen below.
                self.lab.output(HOSTS[0], &["understudy-evacuator", "return", machine.name])?;
            }
        }
        self.wait_home()?;
        self.lab.output(HOSTS[0], &["crm_resource", "--cleanup"])?;
        self.copies.never_twice()
    }

    // ------------------------------------------------------------------------------------------------- the controller

    /// The one process of the controller.
    pub fn controller(&self) -> Result<Process> {
        let mut all = processes::running(&self.lab, "understudy-evacuator", "run")?;
        match (all.pop(), all.is_empty()) {
            (Some(one), true) => Ok(one),
            (None, _) => bail!("the controller runs nowhere"),
            (Some(one), false) => bail!("the controller runs on {} and elsewhere", one.node),
        }
    }

    /// Where the controller runs, when it does and its rounds come to their ends.
    pub fn wait_controller(&self) -> Result<Process> {
        wait_for("the controller", BOUND, || {
            let process = self.controller()?;
            let status = self.controller_status(&process.node)?;
            Ok((status.rounds > 0 && status.trouble.is_empty()).then_some(process))
        })
    }

    fn controller_status(&self, host: &str) -> Result<EvacuatorStatus> {
        let text = self.lab.run(host, &["understudy-evacuator", "status"])?;
        serde_json::from_str(&text)
            .with_context(|| format!("reading the status that understudy-evacuator printed: {text}"))
    }

    /// Wait while the controller comes to the end of `more` rounds.
    pub fn wait_rounds(&self, more: u64) -> Result<()> {
        let process = self.wait_controller()?;
        let before = self.controller_status(&process.node)?.rounds;
        wait_until(&format!("{more} rounds of the controller"), BOUND, || {
            Ok(self.controller_status(&process.node)?.rounds >= before + more)
        })
    }

    /// Have the controller run on `host`.
    pub fn move_controller(&self, host: &str) -> Result<()> {
        if self.wait_controller()?.node == host {
            return Ok(());
        }
        let resource = ["crm_resource", "--resource", "understudy-evacuator"];
        self.lab.run(HOSTS[0], &[&resource[..], &["--move", "--node", host]].concat())?;
        let moved = wait_until("the controller's move", BOUND, || Ok(self.wait_controller()?.node == host));
        self.lab.run(HOSTS[0], &[&resource[..], &["--clear"]].concat())?;
        moved
    }

    // ---------------------------------------------------------------------------------------------- journal and plans

    /// The cluster's journal, what is in it after number `last`.
    pub fn journal(&self, last: u64) -> Result<Vec<Event>> {
        let text = self.lab.run(HOSTS[0], &["understudy-crm", "watch", "--once", "--json"])?;
        let events = text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("no event: {line}")));
        let events = events.collect::<Result<Vec<Event>>>()?;
        Ok(events.into_iter().filter(|event| event.number > last).collect())
    }

    /// The number of the journal's last event.
    pub fn last_event(&self) -> Result<u64> {
        Ok(self.journal(0)?.last().map_or(0, |event| event.number))
    }

    /// Wait for an event after number `last`.
    pub fn wait_event(&self, last: u64, what: &str, is: impl Fn(&Event) -> bool) -> Result<Event> {
        wait_for(what, BOUND, || Ok(self.journal(last)?.into_iter().find(|event| is(event))))
    }

    /// The plans that are not over, by id.
    pub fn open_plans(&self) -> Result<Vec<(String, Moves)>> {
        let text = self.lab.run(HOSTS[0], &["understudy-evacuator", "plans", "--json"])?;
        let plans: Vec<serde_json::Value> = serde_json::from_str(&text).context("reading the plans")?;
        let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let open = plans.iter().filter(|plan| plan["closed"].is_null());
        let plan = |plan: &serde_json::Value| {
            let moves = plan["moves"].as_array().map(Vec::as_slice).unwrap_or_default();
            let moves = moves.iter().map(|m| (word(&m["machine"]), word(&m["progress"]["is"]))).collect();
            (word(&plan["id"]), moves)
        };
        Ok(open.map(plan).collect())
    }

    // ---------------------------------------------------------------------------------------------------------- mails

    /// Mails to `whom` whose subject has `words` in it.
    pub fn mails(&self, whom: &str, words: &str) -> Result<Vec<Mail>> {
        let mails = self.mail.mails()?.into_iter();
        Ok(mails.filter(|mail| mail.to == whom && mail.subject.contains(words)).collect())
    }

    /// Wait until so many of them have arrived.
    pub fn wait_mails(&self, whom: &str, words: &str, count: usize) -> Result<Vec<Mail>> {
        wait_for(&format!("{count} mails to {whom} about {words:?}"), BOUND, || {
            let mails = self.mails(whom, words)?;
            ensure!(mails.len() >= count, "{} so far", mails.len());
            Ok(Some(mails))
        })
    }

    /// Everything that could explain a failure.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for (host, argv) in [
            (HOSTS[0], &["crm_mon", "-1", "-r", "-n", "-f", "-A"][..]),
            (HOSTS[0], &["understudy-crm", "watch", "--once"]),
            (HOSTS[0], &["understudy-evacuator", "plans"]),
            (HOSTS[0], &["cat", "/var/spool/understudy/alerts/journal.jsonl"]),
        ] {
            let Ok(out) = self.lab.output(host, argv) else { continue };
            let _ = write!(text, "--- {host}: {}\n{}", argv.join(" "), String::from_utf8_lossy(&out.stdout));
            text.push_str(&String::from_utf8_lossy(&out.stderr));
        }
        for host in HOSTS {
            let logs = "tail -n 15 /run/understudy/.evacuator/evacuator.log /run/understudy/.monitor/monitor.log";
            if let Ok(out) = self.lab.output(host, &["sh", "-c", &format!("{logs} 2>/dev/null")]) {
                let _ = write!(text, "--- {host}\n{}", String::from_utf8_lossy(&out.stdout));
            }
        }
        for mail in self.mail.mails().unwrap_or_default() {
            let _ = writeln!(text, "mail to {}: {}", mail.to, mail.subject);
        }
        let (looks, longest) = self.copies.looks();
        let _ = writeln!(text, "{looks} looks at all machines, the longest {} ms", longest.as_millis());
        for event in self.lab.events().unwrap_or_default() {
            let _ = writeln!(text, "{} {} {} {}", event.t_ms, event.node, event.event, event.by);
        }
        text
    }
}

/// The policy of the estate.
fn policy(machines: &[Machine], fence_delay: u32, more: &str) -> String {
    let mut text = String::from("[cluster]\nname = \"evacuation\"\n\n");
    for (number, host) in HOSTS.into_iter().enumerate() {
        let address = |plane: Plane| node(host).map(|n| plane.address(n.host).to_string()).unwrap_or_default();
        let rack = number / 2 + 1;
        let _ = write!(
            text,
            "[[nodes]]\nname = \"{host}\"\nrack = \"r{rack}\"\nstorage = \"{}\"\nmanagement = \"{}\"\nbusiness = \"{}\"\n\
             memory = 1024\ncpus = 8\n\n",
            address(Plane::Storage),
            address(Plane::Management),
            address(Plane::Business)
        );
    }
    // What was switched off stays off: the story says when it returns.
    let _ = write!(
        text,
        "[[fencing]]\nname = \"bmc\"\nagent = \"fence_lab\"\nnodes = {HOSTS:?}\n\
         parameters = {{ pcmk_reboot_action = \"off\", pcmk_delay_base = \"{fence_delay}s\" }}\n\n"
    );
    for machine in machines {
        // Many monitors are much work for an emulated processor.
        let _ = write!(
            text,
            "[[machines]]\nname = \"{}\"\nprimary = \"{}\"\nmode = \"restart\"\nmemory = 32\nkernel = \"{KERNEL}\"\nshutdown = \"off\"\n\
             monitor = {{ primary = \"20s\", standby = \"21s\" }}\n{}\n\n",
            machine.name, machine.home, machine.more
        );
    }
    let _ = write!(
        text,
        "[[alerts]]\nname = \"night\"\nkind = \"mail\"\nto = \"{NIGHT}\"\napproves = true\nseverity = \"warning\"\nwindow = 0\n\n\
         [[alerts]]\nname = \"once\"\nkind = \"mail\"\nto = \"{ONCE}\"\nseverity = \"critical\"\nwindow = \"2h\"\n\n{}\n{more}",
        MailServer::policy()
    );
    debug_assert!(NIGHT.ends_with(DOMAIN) && ONCE.ends_with(DOMAIN));
    text
}
