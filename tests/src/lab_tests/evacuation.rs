//! The evacuation controller in a real cluster: four hosts in two racks, real fencing, a real mail server.
//!
//! ```text
//!   rack r1: n1 n2      rack r2: n3 n4       mail: Exim, TLS, a password
//!   web1 … web5 at home on n3: automatic     hand1, hand2 on n4: manual     ask1, ask2 on n2: semi-automatic
//! ```
//! Each story cuts something, waits for what shall follow, and is checked three times: by the process tables of the nodes from outside
//! (where is each machine, was it ever in two places, how often was it started), by the journal, and by the mails that arrived. Then
//! all hosts return and all machines go home.

mod estate;
mod moves;
mod planes;
mod stories;

use anyhow::{Result, ensure};

use estate::{Estate, Machine};

use crate::lab::places;

/// Beginning of the names of all tests here.
pub const PREFIX: &str = "evacuation: ";

/// A test: its name is the sentence that it proves.
type Story = (&'static str, fn(&mut Estate) -> Result<()>);

/// All of them, in an order in which each leaves what the next needs.
const STORIES: &[Story] = &[
    (
        "evacuation: a host that loses its power is fenced, its machines run elsewhere batch by batch, and people are told",
        stories::automatic,
    ),
    ("evacuation: by hand, nothing moves until it is released", stories::manual),
    ("evacuation: semi-automatic, a wrong code moves nothing and the one from the mail does", stories::semi),
    (
        "evacuation: the controller is killed between two batches, and the rest is evacuated all the same, once",
        stories::controller_killed,
    ),
    (
        "evacuation: the controller's host dies between two batches, and the rest is evacuated all the same, once",
        stories::controllers_host_dies,
    ),
    ("evacuation: that a host is lost again is told once to who wants it once", stories::told_once),
    (
        "evacuation: crm_verify, crmsh and pcs accept a policy with controller, monitors and alerts",
        planes::tools_accept,
    ),
    (
        "evacuation: a host without its management network stays, as Corosync has another link",
        planes::management_cut_with_two_links,
    ),
    ("evacuation: machines leave a host without its production network, which is not fenced", planes::production_cut),
    ("evacuation: a host without both networks is fenced, and its machines run elsewhere", planes::both_cut),
    ("evacuation: a machine whose live migration loses its target runs on where it was, once", moves::target_dies),
];

/// Those whose Corosync has one link.
const ONE_LINK: &[Story] = &[(
    "evacuation: with one Corosync link, a host without its management network is fenced, and its machines run elsewhere",
    planes::management_cut_with_one_link,
)];

/// Runs a test of that name, and says whether it went well.
type Run<'a> = &'a mut dyn FnMut(&str, &mut dyn FnMut() -> Result<()>) -> bool;

/// Bring the estates up, and hand each test whose name has `only` in it to `run`.
pub fn play(only: &str, run: Run) {
    // The lab VM's emulated processor takes many minutes for them, and any KVM that the host has runs their machines: tests/run has them there.
    if places::in_vm() && only.is_empty() {
        println!("note    evacuation runs on the host, or here with --only \"{PREFIX}\"");
        return;
    }
    for (stories, one_link) in [(STORIES, false), (ONE_LINK, true)] {
        let wanted: Vec<&Story> = stories.iter().filter(|(name, _)| name.contains(only)).collect();
        if !wanted.is_empty() {
            play_in(one_link, &wanted, run);
        }
    }
}

fn play_in(one_link: bool, stories: &[&Story], run: Run) {
    let mut estate = None;
    let name = match one_link {
        false => "evacuation: four nodes in two racks run the machines of a policy, with a mail server beside them",
        true => "evacuation: four nodes with one Corosync link run the machines of a policy",
    };
    let up = run(name, &mut || {
        let mut fresh = Estate::up(one_link)?;
        let whole = fresh.configure(&machines(), &rules(2)).and_then(|()| fresh.wait_controller());
        if whole.is_err() {
            println!("{}", fresh.describe());
        }
        whole?;
        estate = Some(fresh);
        Ok(())
    });
    let Some(mut estate) = estate.filter(|_| up) else { return };
    for (name, story) in stories {
        let well = run(name, &mut || {
            story(&mut estate)?;
            estate.settle()
        });
        if !well {
            println!("{}", estate.describe());
            if let Err(why) = estate.settle() {
                println!("        no further: the estate is not whole any more: {why:#}");
                return;
            }
        }
    }
    run("evacuation: no machine was in two nodes at any look", &mut || {
        let (looks, longest) = estate.copies.looks();
        println!("note    {looks} looks at all machines, the longest {} ms", longest.as_millis());
        ensure!(looks > 100, "{looks} looks are too few to say so");
        estate.copies.never_twice()
    });
}

const fn machine(name: &'static str, home: &'static str, more: &'static str) -> Machine {
    Machine { name, home, more }
}

fn machines() -> Vec<Machine> {
    let web = "automation = \"automatic\"\nbusiness = \"web\"";
    vec![
        machine("web1", "n3", web),
        machine("web2", "n3", web),
        machine("web3", "n3", web),
        machine("web4", "n3", web),
        machine("web5", "n3", web),
        machine("hand1", "n4", "automation = \"manual\""),
        machine("hand2", "n4", "automation = \"manual\""),
        machine("ask1", "n2", "automation = \"semi\""),
        machine("ask2", "n2", "automation = \"semi\""),
    ]
}

/// `[evacuation]`: half of the hosts may be down, or a controller whose host dies could not go on.
fn rules(batch: usize) -> String {
    format!("[evacuation]\nbatch = {batch}\nverify = \"5min\"\nmax_down = 60\n\n[approval]\nexpires = \"1h\"\n")
}
