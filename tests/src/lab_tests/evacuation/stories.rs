//! What happens to the estate. Every story begins with all machines at home.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::estate::{BOUND, Estate, Event, HOSTS, NIGHT, ONCE};
use super::{machines, rules};
use crate::lab::net::node;
use crate::lab::wait_until;

/// The automatic machines, at home on [`WEB_HOST`].
pub const WEB: [&str; 5] = ["web1", "web2", "web3", "web4", "web5"];
pub const WEB_HOST: &str = "n3";
/// The manual ones.
const HAND: [&str; 2] = ["hand1", "hand2"];
const HAND_HOST: &str = "n4";
/// The semi-automatic ones.
const ASK: [&str; 2] = ["ask1", "ask2"];
const ASK_HOST: &str = "n2";
/// A controller that would do something does it within fewer rounds.
pub const ROUNDS: u64 = 5;

/// Events of `kind`.
fn of<'a>(events: &'a [Event], kind: &'a str) -> impl Iterator<Item = &'a Event> {
    events.iter().filter(move |event| event.kind == kind)
}

/// The plan for machines of `host`.
pub fn wait_plan(estate: &Estate, last: u64, host: &str) -> Result<String> {
    let event =
        estate.wait_event(last, &format!("a plan for {host}"), |e| e.kind == "plan" && e.text.contains(host))?;
    event.plan.context("an event of a plan that names none")
}

/// The event that `plan` is over.
pub fn wait_closed(estate: &Estate, last: u64, plan: &str) -> Result<Event> {
    let closed = |e: &Event| e.kind == "closed" && e.plan.as_deref() == Some(plan);
    estate.wait_event(last, &format!("the end of {plan}"), closed)
}

/// How often `host` was fenced so far, by the lab's own log.
pub fn fences(estate: &Estate, host: &str) -> Result<usize> {
    Ok(estate.lab.events()?.iter().filter(|e| e.node == host && e.event.starts_with("fence-done")).count())
}

/// Each of `names` was started once since starts were forgotten, when each ran already.
pub fn started_once(estate: &Estate, names: &[&str]) -> Result<()> {
    estate.copies.look_again(BOUND)?;
    for name in names {
        let starts = estate.copies.starts(name);
        ensure!(starts == 2, "{name} was {starts} processes, not one at home and one elsewhere");
    }
    estate.copies.never_twice()
}

/// Forget what was started, and see what runs now.
pub fn count_starts(estate: &Estate) -> Result<()> {
    estate.copies.forget_starts();
    wait_until("a look at all machines", BOUND, || {
        Ok(estate.machines.iter().all(|m| estate.copies.starts(m.name) == 1))
    })
}

pub fn automatic(estate: &mut Estate) -> Result<()> {
    let (last, before) = (estate.last_event()?, fences(estate, WEB_HOST)?);
    count_starts(estate)?;
    estate.lab.power_cut(WEB_HOST)?;
    let at = estate.wait_elsewhere(&WEB, WEB_HOST)?;
    ensure!(fences(estate, WEB_HOST)? == before + 1, "{WEB_HOST} was not fenced once");
    started_once(estate, &WEB)?;
    // Not all of a business type in one rack, nor on one host.
    let racks =
        at.values().map(|host| Ok(usize::from(node(host)?.host - 1) / 2)).collect::<Result<BTreeSet<usize>>>()?;
    ensure!(racks.len() == 2, "all of web is in one rack: {at:?}");

    let plan = wait_plan(estate, last, WEB_HOST)?;
    let closed = wait_closed(estate, last, &plan)?;
    ensure!(closed.text.contains("5 machines run, 0 failed, 0 were not moved"), "{}", closed.text);
    let events = estate.journal(last)?;
    let batches = of(&events, "release").count();
    ensure!(batches == 3, "five machines in twos are three batches, not {batches}: {events:?}");
    let runs: BTreeSet<&str> = of(&events, "runs").filter_map(|e| e.machine.as_deref()).collect();
    ensure!(runs == WEB.into(), "{runs:?} run, says the journal");
    for event in of(&events, "runs") {
        let (machine, host) =
            (event.machine.as_deref().unwrap_or_default(), event.text.rsplit(' ').next().unwrap_or_default());
        ensure!(
            at.get(machine).is_some_and(|at| at == host),
            "the journal says {:?}, but it runs on {:?}",
            event.text,
            at.get(machine)
        );
    }
    // A batch is released when the one before it runs.
    let numbers: Vec<u64> = of(&events, "release").map(|e| e.number).collect();
    let ran = |number: u64| of(&events, "runs").filter(|e| e.number < number).count();
    ensure!(numbers.iter().enumerate().all(|(n, number)| ran(*number) == n * 2), "batches overlap: {events:?}");
    // The node of the controller has the same in its file.
    let file = estate
        .lab
        .run(&closed.node, &["understudy-crm", "watch", "--journal", "/var/log/understudy/evacuation.journal"])?;
    ensure!(file.contains(&closed.text), "{}'s journal has not: {}", closed.node, closed.text);

    let lost = estate.wait_mails(NIGHT, &format!("node {WEB_HOST} is lost"), 1)?;
    ensure!(lost.len() == 1, "each of three nodes knows it, and {} tell it", lost.len());
    ensure!(lost[0].text.contains(&format!("node: {WEB_HOST}")), "{}", lost[0].text);
    estate.wait_mails(NIGHT, &format!("node {WEB_HOST} was fenced"), 1)?;
    estate.wait_mails(ONCE, &format!("node {WEB_HOST} is lost"), 1).map(drop)
}

/// Nothing of `names` runs anywhere, though the controller has looked several times.
fn still(estate: &Estate, plan: &str, names: &[&str]) -> Result<()> {
    estate.wait_rounds(ROUNDS)?;
    for name in names {
        let nodes = estate.nodes_of(name)?;
        ensure!(nodes.is_empty(), "{name} runs on {nodes:?}, and nobody has decided about {plan}");
        ensure!(estate.copies.starts(name) == 1, "{name} ran for a moment, and nobody has decided about {plan}");
    }
    let open = estate.open_plans()?;
    let moves = open.iter().find(|(id, _)| id == plan).map(|(_, moves)| moves.clone()).unwrap_or_default();
    let waits = |name: &str| moves.iter().any(|(machine, progress)| machine == name && progress == "waiting");
    ensure!(names.iter().all(|name| waits(name)), "{plan} does not wait: {open:?}");
    Ok(())
}

pub fn manual(estate: &mut Estate) -> Result<()> {
    let last = estate.last_event()?;
    count_starts(estate)?;
    estate.lab.power_cut(HAND_HOST)?;
    let plan = wait_plan(estate, last, HAND_HOST)?;
    still(estate, &plan, &HAND)?;
    let shown = estate.lab.run(HOSTS[0], &["understudy-evacuator", "plans"])?;
    ensure!(shown.contains(&plan) && shown.contains("waits for a decision"), "{shown}");
    let asked = estate.wait_mails(NIGHT, &format!("understudy-evacuator release {plan}"), 1);
    // A long subject is cut; the text has the whole of it.
    let asked = asked.or_else(|_| estate.wait_mails(NIGHT, "have no host", 1))?;
    ensure!(asked.iter().any(|m| m.text.contains(&format!("understudy-evacuator release {plan}"))), "{asked:?}");

    estate.lab.run("n2", &["understudy-evacuator", "release", &plan, HAND[0]])?;
    estate.wait_elsewhere(&HAND[..1], HAND_HOST)?;
    still(estate, &plan, &HAND[1..])?;
    estate.lab.run(HOSTS[0], &["understudy-evacuator", "release", &plan])?;
    estate.wait_elsewhere(&HAND, HAND_HOST)?;
    wait_closed(estate, last, &plan)?;
    started_once(estate, &HAND)?;
    let events = estate.journal(last)?;
    let order = of(&events, "order").map(|e| e.number).min().context("no order in the journal")?;
    ensure!(of(&events, "release").all(|e| e.number > order), "released before it was ordered: {events:?}");
    Ok(())
}

pub fn semi(estate: &mut Estate) -> Result<()> {
    let last = estate.last_event()?;
    count_starts(estate)?;
    estate.lab.power_cut(ASK_HOST)?;
    let plan = wait_plan(estate, last, ASK_HOST)?;
    let mails = estate.wait_mails(NIGHT, &format!("Approval needed for {plan}"), 1)?;
    ensure!(ASK.iter().all(|name| mails[0].text.contains(name)), "{}", mails[0].text);
    ensure!(estate.mails(ONCE, "Approval")?.is_empty(), "who may not approve was asked");
    let command = format!("understudy-crm approve {plan} ");
    let code = mails[0].text.lines().find_map(|line| line.trim().strip_prefix(&command));
    let code = code.with_context(|| format!("no code in: {}", mails[0].text))?;
    still(estate, &plan, &ASK)?;

    // The same letters in another order.
    let wrong: String = code.split('-').rev().collect::<Vec<_>>().join("-");
    ensure!(wrong != code, "two equal halves");
    let refused = estate.lab.output(HOSTS[0], &["understudy-crm", "approve", &plan, &wrong])?;
    ensure!(!refused.status.success(), "a wrong code was taken");
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(why.contains("code"), "it is refused with: {why}");
    still(estate, &plan, &ASK)?;

    estate.lab.run("n4", &["understudy-crm", "approve", &plan, code, "--as", "the night shift"])?;
    estate.wait_elsewhere(&ASK, ASK_HOST)?;
    wait_closed(estate, last, &plan)?;
    started_once(estate, &ASK)?;
    let events = estate.journal(last)?;
    let decided = of(&events, "decided").next().context("no decision in the journal")?;
    ensure!(decided.text.contains("approved"), "{}", decided.text);
    ensure!(of(&events, "release").all(|e| e.number > decided.number), "released before it was approved: {events:?}");
    let again = estate.lab.output(HOSTS[0], &["understudy-crm", "approve", &plan, code])?;
    ensure!(!again.status.success(), "a code was taken twice");
    Ok(())
}

/// Machine by machine: there is time to do something between two of them.
fn one_by_one(estate: &mut Estate) -> Result<u64> {
    estate.configure(&machines(), &rules(1))?;
    let last = estate.last_event()?;
    count_starts(estate)?;
    Ok(last)
}

/// Wait for the first batch, and see that it was not the last.
fn in_the_middle(estate: &Estate, last: u64) -> Result<usize> {
    estate.wait_event(last, "the first batch", |e| e.kind == "release")?;
    let events = estate.journal(last)?;
    let (batches, closed) = (of(&events, "release").count(), of(&events, "closed").count());
    ensure!(batches < WEB.len() && closed == 0, "everything was released before anybody could die: {events:?}");
    Ok(batches)
}

/// The evacuation that was begun has come to its end, each machine started once.
fn goes_on(estate: &Estate, last: u64, before: usize) -> Result<Vec<Event>> {
    let at = estate.wait_elsewhere(&WEB, WEB_HOST)?;
    let plan = wait_plan(estate, last, WEB_HOST)?;
    let closed = wait_closed(estate, last, &plan)?;
    ensure!(closed.text.contains("5 machines run, 0 failed"), "{} ({at:?})", closed.text);
    let events = estate.journal(last)?;
    let released = |name: &str| of(&events, "release").filter(|e| e.text.contains(&format!("{name} on"))).count();
    ensure!(WEB.iter().all(|name| released(name) == 1), "a machine was released twice, or never: {events:?}");
    ensure!(of(&events, "release").count() == WEB.len() && before < WEB.len(), "{events:?}");
    started_once(estate, &WEB)?;
    Ok(events)
}

pub fn controller_killed(estate: &mut Estate) -> Result<()> {
    let last = one_by_one(estate)?;
    estate.move_controller("n2")?;
    estate.lab.power_cut(WEB_HOST)?;
    let before = in_the_middle(estate, last)?;
    let victim = estate.controller()?;
    kill(Pid::from_raw(victim.pid), Signal::SIGKILL).context("killing the controller")?;
    goes_on(estate, last, before)?;
    let heir = estate.wait_controller()?;
    ensure!(heir.pid != victim.pid, "the controller was not killed");
    Ok(())
}

pub fn controllers_host_dies(estate: &mut Estate) -> Result<()> {
    let last = one_by_one(estate)?;
    estate.move_controller(HAND_HOST)?;
    estate.lab.power_cut(WEB_HOST)?;
    let before = in_the_middle(estate, last)?;
    ensure!(estate.controller()?.node == HAND_HOST, "the controller is elsewhere");
    estate.lab.power_cut(HAND_HOST)?;
    let events = goes_on_without(estate, last, before)?;
    let writers: BTreeSet<&str> = events.iter().map(|e| e.node.as_str()).collect();
    ensure!(writers.len() > 1 && writers.contains(HAND_HOST), "{writers:?} wrote the journal");
    Ok(())
}

/// As [`goes_on`]; but what was on its way to the second host, or ran there, was started once more elsewhere.
fn goes_on_without(estate: &Estate, last: u64, before: usize) -> Result<Vec<Event>> {
    let hosts_left = |at: &str| at != WEB_HOST && at != HAND_HOST;
    wait_until("all of web on the two hosts that are left", BOUND, || {
        for name in WEB {
            let nodes = estate.nodes_of(name)?;
            ensure!(nodes.len() == 1 && hosts_left(&nodes[0]), "{name} is in {nodes:?}");
            ensure!(estate.runs_on(name, &nodes[0])?, "{name} does not run on {nodes:?}");
        }
        Ok(true)
    })?;
    estate.copies.never_twice()?;
    wait_until("the end of all automatic plans", BOUND, || {
        let open = estate.open_plans()?;
        ensure!(
            !open.iter().flat_map(|(_, moves)| moves).any(|(machine, _)| WEB.contains(&machine.as_str())),
            "{open:?}"
        );
        Ok(true)
    })?;
    estate.copies.look_again(BOUND)?;
    let events = estate.journal(last)?;
    for name in WEB {
        let starts = estate.copies.starts(name);
        let released = of(&events, "release").filter(|e| e.text.contains(&format!("{name} on"))).count();
        ensure!(starts <= 1 + released, "{name} was {starts} processes after it was released {released} times");
        ensure!(released <= 2, "{name} was released {released} times, and there were two hosts that died: {events:?}");
    }
    ensure!(of(&events, "release").count() > before, "nothing was released after the controller's host had died");
    Ok(events)
}

pub fn told_once(estate: &mut Estate) -> Result<()> {
    let subject = format!("node {WEB_HOST} is lost");
    let (night, once) = (estate.mails(NIGHT, &subject)?.len(), estate.mails(ONCE, &subject)?.len());
    estate.lab.power_cut(WEB_HOST)?;
    estate.wait_mails(NIGHT, &subject, night + 1)?;
    estate.wait_elsewhere(&WEB, WEB_HOST)?;
    // Every node that lived was called, and only the first of them told it.
    for host in HOSTS.into_iter().filter(|host| *host != WEB_HOST) {
        let queue = estate.lab.run(host, &["cat", "/var/spool/understudy/alerts/journal.jsonl"])?;
        let lines = |what: &str| {
            let is = |line: &&str| line.contains(&format!("\"what\":\"{what}\"")) && line.contains(&subject);
            queue.lines().filter(is).count()
        };
        ensure!(lines("queued") > 0, "{host} was not told that {WEB_HOST} is lost: {queue}");
        let told = lines("told");
        ensure!((told > 0) == (host == HOSTS[0]), "{host} told {told} times that {WEB_HOST} is lost: {queue}");
    }
    let (night_now, once_now) = (estate.mails(NIGHT, &subject)?.len(), estate.mails(ONCE, &subject)?.len());
    ensure!(night_now == night + 1, "{} mails more, though one node of three tells it", night_now - night);
    ensure!(once > 0 && once_now == once, "who is told once has heard it {once_now} times");
    Ok(())
}
