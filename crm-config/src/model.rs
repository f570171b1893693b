//! A Pacemaker configuration as far as Understudy writes one: the part that XML, crmsh and pcs have in common.

use std::borrow::Cow;

/// Name and value.
pub type Pair = (String, String);

/// Everything that a policy becomes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Configuration {
    /// Cluster properties.
    pub properties: Vec<Pair>,
    /// Resource defaults.
    pub defaults: Vec<Pair>,
    /// Resources, fencing devices included.
    pub resources: Vec<Resource>,
    /// Constraints.
    pub constraints: Vec<Constraint>,
    /// Fencing levels: only where a node has devices of several levels.
    pub levels: Vec<FencingLevel>,
    /// Who is told of events: only where the policy says it.
    pub alerts: Option<crate::alerts::Alert>,
    /// What the cluster's nodes are told: only where the policy places machines.
    pub nodes: Vec<NodeSettings>,
    /// What the evacuation controller is told of the policy: only where there is one.
    pub estate: Option<String>,
}

/// What a node is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSettings {
    /// The node.
    pub name: String,
    /// Permanent node attributes.
    pub attributes: Vec<Pair>,
    /// Its capacity.
    pub utilization: Vec<Pair>,
}

/// A resource at the top level.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    /// One instance.
    Primitive(Primitive),
    /// Instances on several nodes.
    Clone {
        /// The clone's id.
        id: String,
        /// Its meta attributes.
        meta: Vec<Pair>,
        /// What is cloned.
        primitive: Primitive,
    },
}

impl Resource {
    /// The id at the top level.
    pub fn id(&self) -> &str {
        match self {
            Self::Primitive(primitive) => &primitive.id,
            Self::Clone { id, .. } => id,
        }
    }

    /// The primitive, cloned or not.
    pub fn primitive(&self) -> &Primitive {
        match self {
            Self::Primitive(primitive) | Self::Clone { primitive, .. } => primitive,
        }
    }
}

/// `<primitive>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Primitive {
    /// Its id.
    pub id: String,
    /// Its agent.
    pub agent: Agent,
    /// The agent's parameters.
    pub parameters: Vec<Pair>,
    /// Its meta attributes.
    pub meta: Vec<Pair>,
    /// What it takes of a node's capacity.
    pub utilization: Vec<Pair>,
    /// Its operations.
    pub operations: Vec<Operation>,
}

/// Which agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agent {
    /// `ocf:PROVIDER:TYPE`
    Ocf {
        /// Provider.
        provider: &'static str,
        /// Type.
        kind: &'static str,
    },
    /// `stonith:TYPE`
    Stonith(String),
}

/// `<op>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// The action.
    pub name: &'static str,
    /// Interval in seconds; 0 for what does not recur.
    pub interval: u64,
    /// Timeout in seconds.
    pub timeout: u64,
    /// Only in this role.
    pub role: Option<Role>,
    /// What a failure leads to, if not Pacemaker's default.
    pub on_fail: Option<&'static str>,
}

/// A clone instance's role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs the machine, or sends.
    Promoted,
    /// Stands by, or receives.
    Unpromoted,
}

impl Role {
    /// As Pacemaker writes it (2.1 and later).
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Promoted => "Promoted",
            Self::Unpromoted => "Unpromoted",
        }
    }
}

/// An integer, one of the infinities, or what a node's attribute says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Score {
    /// Must.
    Infinity,
    /// Must not.
    MinusInfinity,
    /// Would rather.
    Finite(i32),
    /// As much as the node attribute of this name says.
    Attribute(String),
}

impl std::fmt::Display for Score {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Infinity => f.write_str("INFINITY"),
            Self::MinusInfinity => f.write_str("-INFINITY"),
            Self::Finite(score) => write!(f, "{score}"),
            Self::Attribute(name) => f.write_str(name),
        }
    }
}

/// `<rsc_location>`, `<rsc_order>`, `<rsc_colocation>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Constraint {
    /// Where a resource may be, by a rule over a node's attributes (all tests must hold).
    Location {
        /// Its id.
        id: String,
        /// The resource.
        resource: String,
        /// Only for this role.
        role: Option<Role>,
        /// How much.
        score: Score,
        /// What a node is tested for.
        tests: Vec<Test>,
        /// Which nodes are looked at for the resource.
        discovery: Discovery,
    },
    /// One action before another.
    Order {
        /// Its id.
        id: String,
        /// First action and its resource.
        first: (&'static str, String),
        /// Second action and its resource.
        then: (&'static str, String),
        /// Whether the opposite actions are ordered the other way round.
        symmetrical: bool,
    },
    /// A resource where another one is.
    Colocation {
        /// Its id.
        id: String,
        /// The resource that follows, and its role.
        resource: (String, Option<Role>),
        /// The one that is followed.
        with: (String, Option<Role>),
    },
}

impl Constraint {
    /// The resource runs on hosts only: boards are remote nodes.
    pub(crate) fn on_hosts(resource: &str) -> Self {
        Self::never_where(resource, vec![Test::is_remote()])
    }

    /// The resource is never on, and never looked for on, nodes of which one of these is true.
    pub(crate) fn never_where(resource: &str, tests: Vec<Test>) -> Self {
        Self::Location {
            id: format!("understudy-location-{resource}"),
            resource: resource.into(),
            role: None,
            score: Score::MinusInfinity,
            tests,
            discovery: Discovery::Never,
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Location { id, .. } | Self::Order { id, .. } | Self::Colocation { id, .. } => id,
        }
    }
}

/// `resource-discovery`: where it is found out whether a resource runs there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discovery {
    /// Everywhere.
    Always,
    /// Not on the nodes to which this constraint applies.
    Never,
    /// Only on the nodes to which this constraint applies; all others are forbidden.
    Exclusive,
}

impl Discovery {
    /// As Pacemaker writes it; `None` for its default.
    pub fn as_str(self) -> Option<&'static str> {
        match self {
            Self::Always => None,
            Self::Never => Some("never"),
            Self::Exclusive => Some("exclusive"),
        }
    }
}

/// One test in a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Test {
    /// Node attribute, `#uname` or `#kind`.
    pub attribute: Cow<'static, str>,
    /// `eq`, `ne` or `defined`.
    pub operation: &'static str,
    /// What it is compared with; `None` for `defined`.
    pub value: Option<String>,
}

impl std::fmt::Display for Test {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{} {} {value}", self.attribute, self.operation),
            None => write!(f, "{} {}", self.operation, self.attribute),
        }
    }
}

impl Test {
    /// The node is `name`.
    pub fn is_node(name: &str) -> Self {
        Self { attribute: "#uname".into(), operation: "eq", value: Some(name.into()) }
    }
    /// The node is not `name`.
    pub fn is_not_node(name: &str) -> Self {
        Self { attribute: "#uname".into(), operation: "ne", value: Some(name.into()) }
    }
    /// The node is a Pacemaker remote node.
    pub fn is_remote() -> Self {
        Self { attribute: "#kind".into(), operation: "eq", value: Some("remote".into()) }
    }
    /// The node has the attribute.
    pub fn is_defined(attribute: &str) -> Self {
        Self { attribute: attribute.to_string().into(), operation: "defined", value: None }
    }
}

/// `<fencing-level>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FencingLevel {
    /// The node.
    pub target: String,
    /// 1 is tried first.
    pub index: u8,
    /// All of these must succeed.
    pub devices: Vec<String>,
}
