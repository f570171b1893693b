//! The notify environment: who is where, what this transition does, and what is true after each of its steps.
//!
//! Pacemaker carries out a clone's transition in the order demote, stop, start, promote. The lists that it passes describe the
//! state *before the transition* and the four sets of changes; an agent that wants to know what holds now has to apply
//! the changes up to the step it is told about. [`Members::after`] does that.
//!
//! When the clone has `notify=true` the same variables accompany the ordinary actions too, so `demote` can see whether another
//! node is about to be promoted.

use crate::environment::Environment;

/// When a notification is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Before the step.
    Pre,
    /// After it.
    Post,
}

/// A step of a transition, in the order in which they happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Promoted instances become unpromoted.
    Demote,
    /// Instances stop.
    Stop,
    /// Instances start.
    Start,
    /// Instances become promoted.
    Promote,
}

/// An instance of the clone and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Resource name.
    pub resource: String,
    /// Node; inactive instances have none.
    pub node: Option<String>,
}

/// What a `notify` action is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notification {
    /// Before or after.
    pub when: When,
    /// Which step.
    pub step: Step,
    /// The lists.
    pub members: Members,
}

/// The lists: three that say how it was before the transition, four that say what the transition does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Members {
    /// Active before the transition, in whichever role.
    pub active: Vec<Instance>,
    /// Promoted before the transition.
    pub promoted: Vec<Instance>,
    /// Unpromoted before the transition.
    pub unpromoted: Vec<Instance>,
    /// Stopped before the transition.
    pub inactive: Vec<Instance>,
    /// Will be demoted.
    pub demote: Vec<Instance>,
    /// Will be stopped.
    pub stop: Vec<Instance>,
    /// Will be started.
    pub start: Vec<Instance>,
    /// Will be promoted.
    pub promote: Vec<Instance>,
}

/// Who is in which role at a moment, by node name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roles {
    /// Nodes with a promoted instance.
    pub promoted: Vec<String>,
    /// Nodes with an unpromoted instance.
    pub unpromoted: Vec<String>,
}

impl Notification {
    /// What the environment of a `notify` action says; `None` if it is not one.
    pub fn from_environment(env: &Environment) -> Option<Self> {
        let when = match env.meta("notify_type")? {
            "pre" => When::Pre,
            "post" => When::Post,
            _ => return None,
        };
        let step = match env.meta("notify_operation")? {
            "demote" => Step::Demote,
            "stop" => Step::Stop,
            "start" => Step::Start,
            "promote" => Step::Promote,
            _ => return None,
        };
        Some(Self { when, step, members: Members::from_environment(env)? })
    }

    /// Who is in which role once the step that this is about has been carried out.
    pub fn roles_after(&self) -> Roles {
        self.members.after(Some(self.step))
    }

    /// Who is in which role at the moment of this notification.
    pub fn roles_now(&self) -> Roles {
        match (self.when, self.step) {
            (When::Post, step) => self.members.after(Some(step)),
            (When::Pre, Step::Demote) => self.members.after(None),
            (When::Pre, Step::Stop) => self.members.after(Some(Step::Demote)),
            (When::Pre, Step::Start) => self.members.after(Some(Step::Stop)),
            (When::Pre, Step::Promote) => self.members.after(Some(Step::Start)),
        }
    }
}

impl Members {
    /// The lists in the environment of any action; `None` when the clone does not have `notify=true`.
    pub fn from_environment(env: &Environment) -> Option<Self> {
        env.with_prefix("OCF_RESKEY_CRM_meta_notify_").next()?;
        // Pacemaker before 2.1 says master and slave, and later ones say both.
        let list = |names: &[&str]| names.iter().map(|n| instances(env, n)).find(|l| !l.is_empty()).unwrap_or_default();
        Some(Self {
            active: list(&["active"]),
            promoted: list(&["promoted", "master"]),
            unpromoted: list(&["unpromoted", "slave"]),
            inactive: list(&["inactive"]),
            demote: list(&["demote"]),
            stop: list(&["stop"]),
            start: list(&["start"]),
            promote: list(&["promote"]),
        })
    }

    /// Who is in which role after all steps up to and including `step`; before the first one for `None`.
    pub fn after(&self, step: Option<Step>) -> Roles {
        let done = |s: Step| step.is_some_and(|last| s <= last);
        let mut promoted = nodes(&self.promoted);
        let mut unpromoted = nodes(&self.unpromoted);
        if done(Step::Demote) {
            shift(&nodes(&self.demote), Some(&mut promoted), Some(&mut unpromoted));
        }
        if done(Step::Stop) {
            shift(&nodes(&self.stop), Some(&mut promoted), None);
            shift(&nodes(&self.stop), Some(&mut unpromoted), None);
        }
        if done(Step::Start) {
            shift(&nodes(&self.start), None, Some(&mut unpromoted));
        }
        if done(Step::Promote) {
            shift(&nodes(&self.promote), Some(&mut unpromoted), Some(&mut promoted));
        }
        Roles { promoted, unpromoted }
    }

    /// Whether this transition promotes an instance on a node other than `node`.
    pub fn promotes_elsewhere(&self, node: &str) -> bool {
        nodes(&self.promote).iter().any(|n| n != node)
    }
}

fn shift(who: &[String], from: Option<&mut Vec<String>>, to: Option<&mut Vec<String>>) {
    if let Some(from) = from {
        from.retain(|n| !who.contains(n));
    }
    if let Some(to) = to {
        to.extend(who.iter().filter(|n| !to.contains(n)).cloned().collect::<Vec<_>>());
    }
}

fn nodes(instances: &[Instance]) -> Vec<String> {
    instances.iter().filter_map(|i| i.node.clone()).collect()
}

/// `notify_X_resource` and `notify_X_uname` are two lists, separated by blanks, that belong together pairwise.
fn instances(env: &Environment, list: &str) -> Vec<Instance> {
    let words = |suffix: &str| env.meta(&format!("notify_{list}_{suffix}")).unwrap_or("").split_whitespace();
    let mut unames = words("uname");
    words("resource").map(|r| Instance { resource: r.to_owned(), node: unames.next().map(str::to_owned) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// n1 is promoted, n2 and n3 are not; n1 goes (demote, stop), n4 comes, n2 is promoted.
    fn switchover(kind: &str, operation: &str) -> Environment {
        let pairs = [
            ("type", kind),
            ("operation", operation),
            ("active_resource", "vm:0 vm:1 vm:2"),
            ("active_uname", "n1 n2 n3"),
            ("promoted_resource", "vm:0 "),
            ("promoted_uname", "n1 "),
            ("unpromoted_resource", "vm:1 vm:2"),
            ("unpromoted_uname", "n2 n3"),
            ("demote_resource", "vm:0"),
            ("demote_uname", "n1"),
            ("stop_resource", "vm:0"),
            ("stop_uname", "n1"),
            ("start_resource", "vm:3"),
            ("start_uname", "n4"),
            ("promote_resource", "vm:1"),
            ("promote_uname", "n2"),
        ];
        Environment::from_pairs(pairs.map(|(k, v)| (format!("OCF_RESKEY_CRM_meta_notify_{k}"), v)))
    }

    fn roles(promoted: &[&str], unpromoted: &[&str]) -> Roles {
        let own = |l: &[&str]| l.iter().map(|s| s.to_string()).collect();
        Roles { promoted: own(promoted), unpromoted: own(unpromoted) }
    }

    #[test]
    fn after_each_step_the_right_nodes_are_in_the_right_role() {
        let table = [
            ("demote", roles(&[], &["n2", "n3", "n1"])),
            ("stop", roles(&[], &["n2", "n3"])),
            ("start", roles(&[], &["n2", "n3", "n4"])),
            ("promote", roles(&["n2"], &["n3", "n4"])),
        ];
        for (operation, expected) in table {
            let n = Notification::from_environment(&switchover("post", operation)).unwrap();
            assert_eq!(n.roles_after(), expected, "{operation}");
            assert_eq!(n.roles_now(), expected, "{operation}");
        }
        let before = Notification::from_environment(&switchover("pre", "demote")).unwrap();
        assert_eq!(before.roles_now(), roles(&["n1"], &["n2", "n3"]));
        let before = Notification::from_environment(&switchover("pre", "promote")).unwrap();
        assert_eq!(before.roles_now(), roles(&[], &["n2", "n3", "n4"]));
    }

    #[test]
    fn a_demote_sees_whether_another_node_is_to_be_promoted() {
        let members = Members::from_environment(&switchover("pre", "demote")).unwrap();
        assert!(members.promotes_elsewhere("n1"));
        assert!(!members.promotes_elsewhere("n2"));
        assert_eq!(Members::from_environment(&Environment::default()), None);
    }

    #[test]
    fn the_old_names_are_understood() {
        let env = Environment::from_pairs([
            ("OCF_RESKEY_CRM_meta_notify_master_resource", "vm:0"),
            ("OCF_RESKEY_CRM_meta_notify_master_uname", "n1"),
        ]);
        assert_eq!(Members::from_environment(&env).unwrap().after(None), roles(&["n1"], &[]));
    }
}
